// Checksums of the data engine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megapoly {

// CRC-32 of zlib and PNG (reflected polynomial 0xEDB88320): by carry-less multiplication where the processor has it.
std::uint32_t crc32(const void* data, std::size_t size) noexcept;

// The same by tables, on any processor.
std::uint32_t crc32_by_tables(const void* data, std::size_t size) noexcept;

}  // namespace megapoly
