// Python's view of the data engine: megapoly.data._index.
#include <pybind11/pybind11.h>

#include <exception>

#include "bindings.h"
#include "common.h"

namespace py = pybind11;

PYBIND11_MODULE(_index, module) {
    module.doc() = "The C++ of the data engine; see megapoly.data.";

    // Never destroyed: translators run until the interpreter has gone.
    static const auto* error = new py::object(py::module_::import("megapoly.errors").attr("DataError"));
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const megapoly::DataError& found) {
            PyErr_SetString(error->ptr(), found.what());
        }
    });

    megapoly::bind_batch(module);
    megapoly::bind_bpe(module);
    megapoly::bind_files(module);
    megapoly::bind_merge(module);
    megapoly::bind_plan(module);
}
