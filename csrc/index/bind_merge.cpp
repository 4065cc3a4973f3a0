// What makes one dataset of several.
#include <pybind11/stl.h>

#include <optional>

#include "bindings.h"
#include "common.h"
#include "duplicates.h"
#include "packer.h"
#include "part.h"
#include "reorder.h"

namespace py = pybind11;

namespace megapoly {
namespace {

using Flags = py::array_t<std::uint8_t, py::array::c_style>;

void hand_on(Part& part, std::int64_t first, const Ids& lengths, const std::optional<Flags>& keep, Documents& to) {
    require_vector(lengths, "lengths");
    if (keep && (keep->ndim() != 1 || keep->size() != lengths.size()))
        throw py::value_error("keep has to be of the shape of lengths");
    const std::int64_t* length = lengths.data();
    const std::int64_t count = lengths.size();
    const std::uint8_t* kept = keep ? keep->data() : nullptr;
    py::gil_scoped_release unlocked;
    part.hand_on(first, length, count, kept, to);
}

py::int_ polynomial_hash(const std::vector<py::bytes>& pieces) {
    PolynomialHash hash;
    for (const py::bytes& each : pieces) {
        const std::string_view piece = each;
        hash.update(reinterpret_cast<const unsigned char*>(piece.data()), piece.size());
    }
    const Hash128 found = hash.finish();
    return py::int_(py::int_(found.high) * py::int_(py::int_(1) << py::int_(64)) + py::int_(found.low));
}

Flags kept(const Duplicates& duplicates, std::int64_t first, std::int64_t count) {
    duplicates.check(first, count);
    Flags flags(count);
    std::uint8_t* flag = flags.mutable_data();
    py::gil_scoped_release unlocked;
    duplicates.kept(first, count, flag);
    return flags;
}

void expect(Reorder& reorder, const Ids& places) {
    require_vector(places, "places");
    reorder.expect(places.data(), places.size());
}

py::array_t<std::int32_t> best_fit_of(const py::array_t<std::int32_t, py::array::c_style>& lengths, std::int64_t pack) {
    require_vector(lengths, "lengths");
    if (pack < 1 || pack > Packer::kTokens) throw py::value_error("a pack has 1 to 2^25 tokens");
    const std::int32_t* length = lengths.data();
    const std::int64_t count = lengths.size();
    std::vector<std::int32_t> packs;
    {
        py::gil_scoped_release unlocked;
        packs = best_fit(length, count, pack);
    }
    return py::array_t<std::int32_t>(static_cast<py::ssize_t>(packs.size()), packs.data());
}

}  // namespace

void bind_merge(py::module_& module) {
    py::class_<Part>(module, "Part")
        .def(py::init<std::string, int, std::int64_t, int, std::vector<std::uint32_t>>(), py::arg("path"),
             py::arg("descriptor"), py::arg("size"), py::arg("code"), py::arg("crcs"))
        .def("hand_on", &hand_on, py::arg("first"), py::arg("lengths"), py::arg("keep"), py::arg("to"));

    module.def("polynomial_hash", &polynomial_hash, py::arg("pieces"));
    py::class_<Duplicates, Documents>(module, "Duplicates")
        .def(py::init<const std::string&>(), py::arg("path"))
        .def("find", &Duplicates::find, py::arg("memory"), py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("documents", &Duplicates::documents)
        .def("kept", &kept, py::arg("first"), py::arg("count"))
        .def("count_kept", &Duplicates::count_kept, py::arg("first"), py::arg("count"),
             py::call_guard<py::gil_scoped_release>());

    py::class_<Reorder, Documents>(module, "Reorder")
        .def(py::init<const std::string&, std::int64_t, std::int64_t, std::int64_t, std::int64_t>(), py::arg("path"),
             py::arg("documents"), py::arg("bytes"), py::arg("item"), py::arg("memory"))
        .def("expect", &expect, py::arg("places"))
        .def_property_readonly("buckets", &Reorder::buckets)
        .def("drain", &Reorder::drain, py::arg("bucket"), py::arg("to"), py::call_guard<py::gil_scoped_release>());

    module.def("best_fit", &best_fit_of, py::arg("lengths"), py::arg("pack"));
    py::class_<Packer, Documents>(module, "Packer")
        .def(py::init<Writer&, std::int64_t, std::int64_t>(), py::arg("to"), py::arg("pack"), py::arg("end"),
             py::keep_alive<1, 2>())
        .def("flush", &Packer::flush, py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("cut", &Packer::cut)
        .def_property_readonly("padded", &Packer::padded)
        .def_property_readonly("padding_tokens", &Packer::padding_tokens);
}

}  // namespace megapoly
