// What makes one dataset of several.
#include <pybind11/stl.h>

#include <optional>

#include "bindings.h"
#include "common.h"
#include "part.h"

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

}  // namespace

void bind_merge(py::module_& module) {
    py::class_<Part>(module, "Part")
        .def(py::init<std::string, int, std::int64_t, int, std::vector<std::uint32_t>>(), py::arg("path"),
             py::arg("descriptor"), py::arg("size"), py::arg("code"), py::arg("crcs"))
        .def("hand_on", &hand_on, py::arg("first"), py::arg("lengths"), py::arg("keep"), py::arg("to"));
}

}  // namespace megapoly
