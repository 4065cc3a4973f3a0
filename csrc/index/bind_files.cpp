// Writing and reading of the two files of an indexed dataset.
#include <pybind11/stl.h>

#include "bindings.h"
#include "common.h"
#include "crc.h"
#include "gather.h"
#include "scan.h"
#include "writer.h"

namespace py = pybind11;

namespace megapoly {
namespace {

template <typename Id>
void append_documents(Writer& writer, const py::array_t<Id, py::array::c_style>& ids, const Ids& lengths) {
    require_vector(ids, "ids");
    require_vector(lengths, "lengths");
    const Id* id = ids.data();
    const std::int64_t* length = lengths.data();
    const std::int64_t count = ids.size(), documents = lengths.size();
    py::gil_scoped_release unlocked;
    writer.append(id, count, length, documents);
}

py::tuple finish(Writer& writer) {
    Written written{};
    {
        py::gil_scoped_release unlocked;
        written = writer.finish();
    }
    return py::make_tuple(written.documents, written.tokens, written.bin_crcs, written.idx_crcs);
}

py::tuple scan_blocks(const std::string& path, int descriptor, int code, std::int64_t vocabulary, std::int64_t first,
                      std::int64_t blocks) {
    constexpr std::int64_t kMost = std::int64_t{1} << 42;  // the places of which fit 64 bits
    if (first < 0 || blocks < 0 || first > kMost || blocks > kMost)
        throw py::value_error("first and blocks have to be from 0 to 2^42");
    Scanned found;
    {
        py::gil_scoped_release unlocked;
        found = scan(path, descriptor, code, vocabulary, first, blocks);
    }
    return py::make_tuple(found.crcs, found.wrong, found.wrong_ids);
}

std::uint32_t checksum(const py::buffer& data, std::uint32_t before, bool by_tables) {
    const py::buffer_info bytes = data.request();
    if (bytes.ndim > 1 || (bytes.ndim == 1 && bytes.strides[0] != bytes.itemsize))
        throw py::value_error("data has to be one row of bytes without gaps");
    const auto size = static_cast<std::size_t>(bytes.size * bytes.itemsize);
    py::gil_scoped_release unlocked;
    return by_tables ? crc32_by_tables(bytes.ptr, size, before) : crc32(bytes.ptr, size, before);
}

Ids gather_windows(const std::string& path, int descriptor, int code, std::int64_t count, std::int64_t vocabulary,
           const Ids& starts, std::int64_t length) {
    require_vector(starts, "starts");
    if (length < 0) throw py::value_error("length has to be at least 0");
    const std::int64_t* start = starts.data();
    const std::int64_t rows = starts.size();
    // Checked here too: a length far beyond the file would ask for the memory before it is refused.
    if (length > count)
        throw DataError(path + ": a window of " + std::to_string(length) +
                        " tokens is longer than the file's " + std::to_string(count));
    Ids out({rows, length});
    std::int64_t* line = out.mutable_data();
    py::gil_scoped_release unlocked;
    gather({path, descriptor, code, count, vocabulary}, start, rows, length, line);
    return out;
}

}  // namespace

void bind_files(py::module_& module) {
    module.attr("BLOCK_BYTES") = kBlock;

    py::class_<Documents>(module, "Documents");
    py::class_<Writer, Documents>(module, "Writer")
        .def(py::init<const std::string&, const std::string&, int, std::int64_t>(), py::arg("bin_path"),
             py::arg("idx_path"), py::arg("code"), py::arg("vocabulary"))
        .def("append", &append_documents<std::int32_t>, py::arg("ids").noconvert(), py::arg("lengths"))
        .def("append", &append_documents<std::int64_t>, py::arg("ids"), py::arg("lengths"))
        .def_property_readonly("documents", &Writer::documents)
        .def_property_readonly("tokens", &Writer::tokens)
        .def("finish", &finish);

    module.def("scan", &scan_blocks, py::arg("path"), py::arg("descriptor"), py::arg("code"), py::arg("vocabulary"),
               py::arg("first"), py::arg("blocks"));
    module.def("crc32", &checksum, py::arg("data"), py::arg("before") = 0, py::arg("by_tables") = false);

    module.def("gather", &gather_windows, py::arg("path"), py::arg("descriptor"), py::arg("code"), py::arg("count"),
               py::arg("vocabulary"), py::arg("starts"), py::arg("length"));
}

}  // namespace megapoly
