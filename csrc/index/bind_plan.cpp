// The data plan.
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "permutation.h"
#include "plan.h"

namespace py = pybind11;

namespace megapoly {
namespace {

Ids permute(std::uint64_t key, const Ids& index, std::int64_t size, bool inverse) {
    require_vector(index, "index");
    const Permutation permutation(key, size);
    Ids image(index.size());
    const auto count = static_cast<std::size_t>(index.size());
    const std::int64_t* from = index.data();
    std::int64_t* to = image.mutable_data();
    py::gil_scoped_release unlocked;
    for (std::size_t i = 0; i < count; ++i) {
        if (from[i] < 0 || from[i] >= size) throw std::invalid_argument("an index outside the permuted range");
        to[i] = inverse ? permutation.inverse(from[i]) : permutation(from[i]);
    }
    return image;
}

Ids counts_in_block(std::uint64_t key, const std::vector<std::int64_t>& quotas, std::int64_t block, std::int64_t slot) {
    Slots slots(quotas.data(), quotas.size(), block, key);
    {
        py::gil_scoped_release unlocked;
        slots.move_to(slot);
    }
    return Ids(static_cast<py::ssize_t>(quotas.size()), slots.counts().data());
}

py::tuple locate(const Plan& plan, const Ids& samples) {
    require_vector(samples, "samples");
    py::array_t<std::int32_t> source(samples.size());
    Ids window(samples.size()), epoch(samples.size()), count(samples.size());
    const Places out{source.mutable_data(), window.mutable_data(), epoch.mutable_data(), count.mutable_data()};
    const std::int64_t* numbers = samples.data();
    const auto size = static_cast<std::size_t>(samples.size());
    {
        py::gil_scoped_release unlocked;
        plan.locate(numbers, size, out);
    }
    return py::make_tuple(source, window, epoch, count);
}

}  // namespace

void bind_plan(py::module_& module) {
    py::class_<Plan>(module, "Plan")
        .def(py::init([](std::int64_t samples, std::vector<std::int64_t> first, std::vector<std::int64_t> block,
                         std::vector<std::int64_t> quotas, std::vector<std::int64_t> starts,
                         std::vector<std::int64_t> windows, std::string block_text,
                         std::vector<std::string> epoch_texts) {
                 SegmentTable segments{std::move(first), std::move(block), std::move(quotas), std::move(starts)};
                 return std::make_unique<Plan>(samples, std::move(segments), std::move(windows), std::move(block_text),
                                               std::move(epoch_texts));
             }),
             py::arg("samples"), py::arg("first"), py::arg("block"), py::arg("quotas"), py::arg("starts"),
             py::arg("windows"), py::arg("block_text"), py::arg("epoch_texts"))
        .def("locate", &locate, py::arg("samples"));
    module.def("permute", &permute, py::arg("key"), py::arg("index"), py::arg("size"), py::arg("inverse") = false);
    module.def("counts_in_block", &counts_in_block, py::arg("key"), py::arg("quotas"), py::arg("block"),
               py::arg("slot"));
    module.def("key_of", &key_of, py::arg("text"));
}

}  // namespace megapoly
