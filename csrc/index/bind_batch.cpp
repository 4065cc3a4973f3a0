// Whole batches.
#include <pybind11/stl.h>

#include <optional>

#include "batch.h"
#include "bindings.h"
#include "common.h"

namespace py = pybind11;

namespace megapoly {
namespace {

template <typename T>
using Matrix = py::array_t<T, py::array::c_style>;

// The data of a writable [rows, length] matrix, null where there is none.
template <typename T>
T* data_of(std::optional<Matrix<T>>& matrix, std::int64_t rows, std::int64_t length, const char* name) {
    if (!matrix) return nullptr;
    if (matrix->ndim() != 2 || matrix->shape(0) != rows || matrix->shape(1) != length)
        throw py::value_error(std::string(name) + " has to have the shape of positions");
    return matrix->mutable_data();
}

// A vector of 64-bit integers, at any address.
py::array numbers(const py::handle& object) {
    const auto array = py::cast<py::array>(object);
    if (array.ndim() != 1 || array.itemsize() != 8 || array.dtype().kind() != 'i' || array.strides(0) != 8)
        throw py::value_error("an index has to be a vector of 64-bit integers");
    return array;
}

void fill_rows(const py::tuple& file, const std::optional<py::tuple>& index, const Ids& starts, const Ids& rows,
               std::int64_t limit, std::optional<Matrix<std::int64_t>> tokens,
               std::optional<Matrix<std::int64_t>> labels, std::optional<Matrix<std::int64_t>> positions,
               std::optional<Matrix<std::int32_t>> documents) {
    require_vector(starts, "starts");
    require_vector(rows, "rows");
    if (!positions || positions->ndim() != 2) throw py::value_error("positions has to have two dimensions");
    const std::int64_t height = positions->shape(0), length = positions->shape(1);
    if (tokens.has_value() != labels.has_value() || index.has_value() != documents.has_value())
        throw py::value_error("tokens go with labels, and documents with their index");
    if (starts.size() != rows.size() || length < 1) throw py::value_error("starts and rows have to be of one length");
    for (py::ssize_t i = 0; i < rows.size(); ++i)
        if (rows.at(i) < 0 || rows.at(i) >= height) throw py::value_error("a row is outside the batch");
    const Columns out{data_of(tokens, height, length, "tokens"), data_of(labels, height, length, "labels"),
                      data_of(positions, height, length, "positions"),
                      data_of(documents, height, length, "documents")};
    const Tokens source{file[0].cast<std::string>(), file[1].cast<int>(), file[2].cast<int>(),
                        file[3].cast<std::int64_t>(), file[4].cast<std::int64_t>()};
    std::optional<Boundaries> boundaries;
    if (index) {
        const auto pointers = numbers((*index)[1]), indices = numbers((*index)[2]);
        boundaries = Boundaries{(*index)[0].cast<std::string>(), Numbers(pointers.data()), pointers.size(),
                                Numbers(indices.data()),         indices.size() - 1, (*index)[3].cast<std::int64_t>()};
    }
    const std::int64_t *start = starts.data(), *row = rows.data();
    const std::int64_t count = starts.size();
    py::gil_scoped_release unlocked;
    fill(source, boundaries ? &*boundaries : nullptr, start, row, count, length, limit, out);
}

}  // namespace

void bind_batch(py::module_& module) {
    module.def("fill", &fill_rows, py::arg("file"), py::arg("index"), py::arg("starts"), py::arg("rows"),
               py::arg("limit"), py::arg("tokens").noconvert(), py::arg("labels").noconvert(),
               py::arg("positions").noconvert(), py::arg("documents").noconvert());
}

}  // namespace megapoly
