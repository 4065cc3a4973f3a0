// The byte-pair encoder.
#include <cstring>

#include "bindings.h"
#include "bpe.h"
#include "common.h"

namespace py = pybind11;

namespace megapoly {
namespace {

// What a str or bytes holds, without a copy; it lives as long as the object.
std::string_view view_of(py::handle text) {
    Py_ssize_t size = 0;
    if (PyBytes_Check(text.ptr())) {
        char* bytes = nullptr;
        PyBytes_AsStringAndSize(text.ptr(), &bytes, &size);
        return {bytes, static_cast<std::size_t>(size)};
    }
    if (!PyUnicode_Check(text.ptr())) throw py::type_error("texts have to be str or bytes");
    const char* bytes = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (bytes == nullptr) {
        PyErr_Clear();
        throw DataError("a text holds half a surrogate pair, which is not text");
    }
    return {bytes, static_cast<std::size_t>(size)};
}

template <typename T>
py::array_t<T> array_of(const std::vector<T>& values) {
    py::array_t<T> array(static_cast<py::ssize_t>(values.size()));
    if (!values.empty()) std::memcpy(array.mutable_data(), values.data(), values.size() * sizeof(T));
    return array;
}

py::tuple encode(const BpeEncoder& encoder, const py::sequence& texts, int threads) {
    const py::tuple held(texts);  // keeps every text alive while the lock is released
    std::vector<std::string_view> views;
    views.reserve(held.size());
    for (const py::handle text : held) views.push_back(view_of(text));
    std::vector<std::int32_t> ids;
    std::vector<std::int64_t> lengths;
    {
        py::gil_scoped_release unlocked;
        encoder.encode(views, threads, ids, lengths);
    }
    return py::make_tuple(array_of(ids), array_of(lengths));
}

}  // namespace

void bind_bpe(py::module_& module) {
    py::class_<BpeEncoder>(module, "BpeEncoder")
        .def(py::init([](const py::bytes& model) {
                 const std::string_view bytes = model;
                 py::gil_scoped_release unlocked;
                 return BpeEncoder(bytes);
             }),
             py::arg("model"))
        .def_property_readonly("refusal", &BpeEncoder::refusal)
        .def("encode", &encode, py::arg("texts"), py::arg("threads"));
}

}  // namespace megapoly
