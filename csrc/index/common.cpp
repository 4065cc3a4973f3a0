#include "common.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "crc.h"

namespace megapoly {
namespace {

[[noreturn]] void fail(const std::string& path, const char* what) {
    throw DataError(path + ": cannot be " + what + " (" + std::strerror(errno) + ")");
}

void write_all(int descriptor, const std::string& path, const unsigned char* data, std::size_t size) {
    while (size > 0) {
        const ssize_t count = ::write(descriptor, data, size);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) fail(path, "written");
        data += count;
        size -= static_cast<std::size_t>(count);
    }
}

}  // namespace

OutputFile::OutputFile(const std::string& path)
    : path_(path), descriptor_(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
    if (descriptor_ < 0) fail(path_, "created");
    buffer_.reserve(kBlock);
}

OutputFile::~OutputFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

void OutputFile::write(const void* data, std::size_t size) {
    if (descriptor_ < 0) throw DataError(path_ + ": is finished already");
    const auto* at = static_cast<const unsigned char*>(data);
    while (size > 0) {
        const std::size_t part = std::min(size, kBlock - buffer_.size());
        buffer_.insert(buffer_.end(), at, at + part);
        at += part;
        size -= part;
        if (buffer_.size() == kBlock) flush();
    }
}

// The buffer is one block, so that every flush but the last ends one.
void OutputFile::flush() {
    if (buffer_.empty()) return;
    block_crcs_.push_back(crc32(buffer_.data(), buffer_.size()));
    write_all(descriptor_, path_, buffer_.data(), buffer_.size());
#ifdef __linux__
    // The disk begins at once, beside what comes next, so that little is left for finish(). Where it cannot, it waits.
    ::sync_file_range(descriptor_, static_cast<off_t>(written_), static_cast<off_t>(buffer_.size()),
                      SYNC_FILE_RANGE_WRITE);
#endif
    written_ += buffer_.size();
    buffer_.clear();
}

void OutputFile::finish() {
    if (descriptor_ < 0) throw DataError(path_ + ": is finished already");
    flush();
    if (::fsync(descriptor_) != 0) fail(path_, "brought to the disk");
    const int descriptor = descriptor_;
    descriptor_ = -1;
    if (::close(descriptor) != 0) fail(path_, "closed");
}

NamelessFile::NamelessFile(const std::string& path) : path_(path), descriptor_(-1) {
#ifdef O_TMPFILE
    const std::size_t slash = path.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    descriptor_ = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (descriptor_ >= 0) return;
#endif
    std::string name = path + ".XXXXXX";  // where the file system knows no file that never had a name
    descriptor_ = ::mkostemp(name.data(), O_CLOEXEC);
    if (descriptor_ < 0) fail(path_, "created");
    ::unlink(name.c_str());
}

NamelessFile::~NamelessFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

void NamelessFile::append(const void* data, std::size_t size) {
    write_all(descriptor_, path_, static_cast<const unsigned char*>(data), size);
}

Spool::Spool(const std::string& path) : file_(path) { buffer_.reserve(kBlock); }

void Spool::append(const void* data, std::size_t size) {
    const auto* at = static_cast<const unsigned char*>(data);
    while (size > 0) {
        const std::size_t part = std::min(size, kBlock - buffer_.size());
        buffer_.insert(buffer_.end(), at, at + part);
        at += part;
        size -= part;
        if (buffer_.size() == kBlock) flush();
    }
}

void Spool::flush() {
    file_.append(buffer_.data(), buffer_.size());
    buffer_.clear();
}

void Spool::read(const std::function<void(const unsigned char*, std::size_t)>& visit) {
    flush();
    std::vector<unsigned char> part(kBlock);
    off_t offset = 0;
    std::size_t held = 0;
    for (;;) {
        const ssize_t count = ::pread(file_.number(), part.data() + held, kBlock - held, offset);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) fail(file_.path(), "read");
        offset += count;
        held += static_cast<std::size_t>(count);
        if (count > 0 && held < kBlock) continue;
        if (held > 0) visit(part.data(), held);
        if (count == 0) return;
        held = 0;
    }
}

}  // namespace megapoly
