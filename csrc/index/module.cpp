// Python's view of the data engine: megapoly.data._index.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>

#include "common.h"
#include "gather.h"
#include "writer.h"

namespace py = pybind11;

namespace {

using Ids = py::array_t<std::int64_t, py::array::c_style>;

void require_vector(const Ids& array, const char* name) {
    if (array.ndim() != 1) throw py::value_error(std::string(name) + " has to have one dimension");
}

void append(megapoly::Writer& writer, const Ids& ids, const Ids& lengths) {
    require_vector(ids, "ids");
    require_vector(lengths, "lengths");
    const std::int64_t *id = ids.data(), *length = lengths.data();
    const std::int64_t count = ids.size(), documents = lengths.size();
    py::gil_scoped_release unlocked;
    writer.append(id, count, length, documents);
}

py::tuple finish(megapoly::Writer& writer) {
    megapoly::Written written{};
    {
        py::gil_scoped_release unlocked;
        written = writer.finish();
    }
    return py::make_tuple(written.documents, written.tokens, written.bin_crcs, written.idx_crcs);
}

Ids gather(const std::string& path, int descriptor, int code, std::int64_t count, std::int64_t vocabulary,
           const Ids& starts, std::int64_t length) {
    require_vector(starts, "starts");
    if (length < 0) throw py::value_error("length has to be at least 0");
    const std::int64_t* start = starts.data();
    const std::int64_t rows = starts.size();
    // Checked here too: a length far beyond the file would ask for the memory before it is refused.
    if (length > count)
        throw megapoly::DataError(path + ": a window of " + std::to_string(length) +
                                  " tokens is longer than the file's " + std::to_string(count));
    Ids out({rows, length});
    std::int64_t* line = out.mutable_data();
    py::gil_scoped_release unlocked;
    megapoly::gather({path, descriptor, code, count, vocabulary}, start, rows, length, line);
    return out;
}

}  // namespace

PYBIND11_MODULE(_index, module) {
    module.doc() = "Writes and reads indexed datasets; see megapoly.data.indexed.";
    module.attr("BLOCK_BYTES") = megapoly::kBlock;

    // Never destroyed: translators run until the interpreter has gone.
    static const auto* error = new py::object(py::module_::import("megapoly.errors").attr("DataError"));
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const megapoly::DataError& found) {
            PyErr_SetString(error->ptr(), found.what());
        }
    });

    py::class_<megapoly::Writer>(module, "Writer")
        .def(py::init<const std::string&, const std::string&, int, std::int64_t>(), py::arg("bin_path"),
             py::arg("idx_path"), py::arg("code"), py::arg("vocabulary"))
        .def("append", &append, py::arg("ids"), py::arg("lengths"))
        .def("finish", &finish);

    module.def("gather", &gather, py::arg("path"), py::arg("descriptor"), py::arg("code"), py::arg("count"),
               py::arg("vocabulary"), py::arg("starts"), py::arg("length"));
}
