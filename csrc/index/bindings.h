// The parts of Python's view of the data engine, one file each (bind_*.cpp); module.cpp joins them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace megapoly {

using Ids = pybind11::array_t<std::int64_t, pybind11::array::c_style>;

inline bool is_aligned(const pybind11::array& array) {
    return (array.flags() & pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
}

inline void require_vector(const pybind11::array& array, const char* name) {
    if (array.ndim() != 1) throw pybind11::value_error(std::string(name) + " has to have one dimension");
    if (!is_aligned(array)) throw pybind11::value_error(std::string(name) + " has to be aligned");
}

void bind_batch(pybind11::module_& module);
void bind_bpe(pybind11::module_& module);
void bind_files(pybind11::module_& module);
void bind_merge(pybind11::module_& module);
void bind_plan(pybind11::module_& module);

}  // namespace megapoly
