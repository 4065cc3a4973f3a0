// Checksums of the data engine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megapoly {

// CRC-32 of zlib and PNG (reflected polynomial 0xEDB88320): by carry-less multiplication where the processor has it.
// `before` is that of the bytes that stand before these.
std::uint32_t crc32(const void* data, std::size_t size, std::uint32_t before = 0) noexcept;

// The same by tables, on any processor.
std::uint32_t crc32_by_tables(const void* data, std::size_t size, std::uint32_t before = 0) noexcept;

}  // namespace megapoly
