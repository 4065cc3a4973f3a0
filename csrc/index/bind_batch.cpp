// Whole batches.
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "batch.h"
#include "bindings.h"
#include "common.h"

namespace py = pybind11;

namespace megapoly {
namespace {

using Sources = std::vector<std::shared_ptr<const Dataset>>;

template <typename Id>
Id* data_of(std::optional<py::array>& matrix, const py::array& like, const char* name) {
    if (!matrix) return nullptr;
    if (!matrix->dtype().equal(like.dtype()) || matrix->ndim() != 2 || matrix->shape(0) != like.shape(0) ||
        matrix->shape(1) != like.shape(1) || (matrix->flags() & py::array::c_style) == 0 || !is_aligned(*matrix))
        throw py::value_error(std::string(name) + " has to be of the type and the shape of positions");
    return static_cast<Id*>(matrix->mutable_data());
}

template <typename Id>
void fill_as(const Windows& windows, std::optional<py::array>& tokens, std::optional<py::array>& labels,
             std::optional<py::array> positions, std::vector<std::int32_t>* cu_seqlens, Progress& progress) {
    if (windows.vocabulary < 1 || windows.vocabulary - 1 > std::numeric_limits<Id>::max())
        throw py::value_error("a vocabulary of " + std::to_string(windows.vocabulary) + " does not fit the ids' type");
    const py::array like = *positions;
    const Columns<Id> out{data_of<Id>(tokens, like, "tokens"), data_of<Id>(labels, like, "labels"),
                          data_of<Id>(positions, like, "positions")};
    py::gil_scoped_release unlocked;
    fill(windows, out, cu_seqlens, progress);
}

Ids boundaries(const Dataset& dataset, std::int64_t start, std::int64_t last) {
    std::vector<std::int64_t> found;
    {
        py::gil_scoped_release unlocked;
        dataset.boundaries().between(start, last, found);
    }
    return Ids(static_cast<py::ssize_t>(found.size()), found.data());
}

py::object fill_batch(const Sources& sources, const py::array_t<std::int32_t, py::array::c_style>& source,
                      const Ids& starts, const Ids& limits, std::int64_t vocabulary, bool separate,
                      std::optional<py::array> tokens, std::optional<py::array> labels, const py::array& positions,
                      Progress& progress, bool all) {
    require_vector(source, "source");
    require_vector(starts, "starts");
    require_vector(limits, "limits");
    const py::ssize_t rows = source.size();
    if (positions.ndim() != 2 || positions.shape(0) != rows || starts.size() != rows || limits.size() != rows)
        throw py::value_error("source, starts, limits and positions have to be of one length");
    const std::int64_t length = positions.shape(1);
    if (length < 1 || rows > std::numeric_limits<std::int32_t>::max() / length)
        throw py::value_error("a batch has to have from 1 token a row to 2^31 - 1 tokens");
    if (tokens.has_value() != labels.has_value()) throw py::value_error("tokens go with labels");
    const auto count = static_cast<std::int32_t>(sources.size());
    for (py::ssize_t i = 0; i < rows; ++i)
        if (source.at(i) < -1 || source.at(i) >= count) throw py::value_error("a row is of no source");
    std::vector<const Dataset*> datasets;
    for (const auto& each : sources) {
        if (each == nullptr) throw py::value_error("a source is None");
        datasets.push_back(each.get());
    }
    const Windows windows{datasets, source.data(), starts.data(), limits.data(), rows, length, vocabulary, all};
    std::vector<std::int32_t> cu_seqlens;
    auto* ends = separate ? &cu_seqlens : nullptr;
    if (positions.dtype().equal(py::dtype::of<std::int32_t>()))
        fill_as<std::int32_t>(windows, tokens, labels, positions, ends, progress);
    else if (positions.dtype().equal(py::dtype::of<std::int64_t>()))
        fill_as<std::int64_t>(windows, tokens, labels, positions, ends, progress);
    else
        throw py::value_error("tokens, labels and positions are int32 or int64");
    if (!separate) return py::none();
    return py::array_t<std::int32_t>(static_cast<py::ssize_t>(cu_seqlens.size()), cu_seqlens.data());
}

}  // namespace

void bind_batch(py::module_& module) {
    py::class_<Dataset, std::shared_ptr<Dataset>>(module, "Dataset")
        .def(py::init<std::string, int, int, std::int64_t, std::string, int, std::int64_t, std::int64_t,
                      std::int64_t, std::int64_t>(),
             py::arg("bin_path"), py::arg("bin"), py::arg("code"), py::arg("tokens"), py::arg("idx_path"),
             py::arg("idx"), py::arg("sequences"), py::arg("documents"), py::arg("padding") = -1,
             py::arg("marked") = 0)
        .def("boundaries", &boundaries, py::arg("start"), py::arg("last"));
    py::class_<Progress>(module, "Progress")
        .def(py::init<>())
        .def_property_readonly("source", [](const Progress& progress) { return progress.source.load(); })
        .def_property_readonly("bytes", [](const Progress& progress) { return progress.bytes.load(); });
    module.def("fill", &fill_batch, py::arg("sources"), py::arg("source"), py::arg("starts"), py::arg("limits"),
               py::arg("vocabulary"), py::arg("separate"), py::arg("tokens"), py::arg("labels"), py::arg("positions"),
               py::arg("progress"), py::arg("all") = false);
}

}  // namespace megapoly
