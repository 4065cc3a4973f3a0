#include "reorder.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "gather.h"

namespace megapoly {
namespace {

constexpr std::int64_t kLeastBuffer = std::int64_t{1} << 14;
constexpr std::int64_t kMostBuffer = std::int64_t{1} << 20;
constexpr std::int64_t kOverhead = 32;  // bytes that a document takes beside its own, in a bucket and while it is sorted

}  // namespace

// A quarter of the memory is for the buffers, a quarter for the mean bucket, so that one of twice the mean fits.
Reorder::Reorder(const std::string& path, std::int64_t documents, std::int64_t bytes, std::int64_t item,
                 std::int64_t memory)
    : file_(path), documents_(documents), item_(item), memory_(memory) {
    constexpr std::int64_t kMost = std::int64_t{1} << 56;
    if (documents < 0 || bytes < 0 || memory < 0 || documents > kMost || bytes > kMost || item < 1 || item > 8)
        throw DataError(file_.path() + ": cannot shuffle " + std::to_string(documents) + " documents of " +
                        std::to_string(bytes) + " bytes in " + std::to_string(memory));
    const std::int64_t all = bytes + kOverhead * documents, quarter = memory / 4;
    if (all <= 3 * quarter) {
        buckets_.resize(1);
        buckets_[0].buffer.reserve(static_cast<std::size_t>(bytes + static_cast<std::int64_t>(sizeof(Head)) * documents));
        limit_ = std::numeric_limits<std::int64_t>::max();
        return;
    }
    const std::int64_t count = quarter > 0 ? (all + quarter - 1) / quarter : all;
    limit_ = std::min(kMostBuffer, quarter / count / 4096 * 4096);
    if (limit_ < kLeastBuffer) {
        std::int64_t needed = 1;
        while (needed * (std::int64_t{1} << 40) / 16 / kLeastBuffer * needed < all) ++needed;
        throw DataError(file_.path() + ": to shuffle " + std::to_string(all) + " bytes needs at least " +
                        std::to_string(needed + 1) + " MB of memory; raise memory_mb");
    }
    buckets_.resize(static_cast<std::size_t>(count));
}

void Reorder::expect(const std::int64_t* places, std::int64_t count) {
    if (next_ != places_.size()) throw DataError(file_.path() + ": fewer documents came than places were given");
    if (std::any_of(places, places + count, [&](std::int64_t place) { return place < 0 || place >= documents_; }))
        throw DataError(file_.path() + ": a place is not among the " + std::to_string(documents_) + " documents");
    places_.assign(places, places + count);
    next_ = 0;
}

void Reorder::begin(std::int64_t tokens) {
    if (open_ != nullptr) throw DataError(file_.path() + ": a document before did not come whole; shuffle them again");
    if (next_ == places_.size()) throw DataError(file_.path() + ": more documents came than places were given");
    const Head head{places_[next_], tokens * item_};
    const auto bucket = static_cast<unsigned __int128>(head.place) * buckets_.size() / static_cast<std::uint64_t>(documents_);
    open_ = &buckets_[static_cast<std::size_t>(bucket)];
    ++open_->documents;
    append(*open_, reinterpret_cast<const unsigned char*>(&head), sizeof(head));
}

void Reorder::end() {
    open_ = nullptr;
    ++next_;
}

void Reorder::piece(const unsigned char* bytes, std::size_t size) { append(*open_, bytes, size); }

void Reorder::append(Bucket& to, const unsigned char* bytes, std::size_t size) {
    while (size > 0) {
        const auto part = std::min(size, static_cast<std::size_t>(limit_) - to.buffer.size());
        to.buffer.insert(to.buffer.end(), bytes, bytes + part);
        bytes += part;
        size -= part;
        if (static_cast<std::int64_t>(to.buffer.size()) < limit_) continue;
        file_.append(to.buffer.data(), to.buffer.size());
        to.extents.push_back(written_);
        written_ += limit_;
        to.buffer.clear();
    }
}

template <typename Visit>
void Reorder::read(const Bucket& from, std::int64_t start, std::int64_t size, std::vector<unsigned char>& room,
                   Visit&& visit) {
    const std::int64_t in_file = static_cast<std::int64_t>(from.extents.size()) * (from.extents.empty() ? 0 : limit_);
    while (size > 0) {
        std::int64_t part = size;
        if (start >= in_file) {
            visit(from.buffer.data() + (start - in_file), static_cast<std::size_t>(part));
        } else {
            const std::int64_t inside = start % limit_;
            part = std::min(size, limit_ - inside);
            room.resize(static_cast<std::size_t>(limit_));
            read_exactly(file_.path(), file_.number(), room.data(), static_cast<std::size_t>(part),
                         from.extents[static_cast<std::size_t>(start / limit_)] + inside);
            visit(static_cast<const unsigned char*>(room.data()), static_cast<std::size_t>(part));
        }
        start += part;
        size -= part;
    }
}

std::int64_t Reorder::drain(std::int64_t number, Documents& to) {
    if (next_ != places_.size()) throw DataError(file_.path() + ": fewer documents came than places were given");
    if (number < 0 || number >= buckets()) throw DataError(file_.path() + ": there is no bucket " + std::to_string(number));
    Bucket bucket;
    std::swap(bucket, buckets_[static_cast<std::size_t>(number)]);
    const auto head_size = static_cast<std::int64_t>(sizeof(Head));
    std::vector<unsigned char> room;
    std::int64_t size = static_cast<std::int64_t>(bucket.buffer.size());
    if (!bucket.extents.empty()) size += static_cast<std::int64_t>(bucket.extents.size()) * limit_;
    // One with documents so long that it is much larger than the mean stays in the file, and is read from there.
    if (!bucket.extents.empty() && size + head_size * bucket.documents <= memory_ / 2) {
        std::vector<unsigned char> whole;
        whole.reserve(static_cast<std::size_t>(size));
        read(bucket, 0, size, room, [&](const unsigned char* bytes, std::size_t there) {
            whole.insert(whole.end(), bytes, bytes + there);
        });
        bucket.extents.clear();
        bucket.buffer = std::move(whole);
    }
    std::vector<Head> heads(static_cast<std::size_t>(bucket.documents));  // the size becomes the position
    std::int64_t position = 0;
    for (Head& head : heads) {
        auto* into = reinterpret_cast<unsigned char*>(&head);
        read(bucket, position, head_size, room, [&](const unsigned char* bytes, std::size_t there) {
            std::memcpy(into, bytes, there);
            into += there;
        });
        const std::int64_t next = position + head_size + head.size;
        head.size = position;
        position = next;
    }
    std::sort(heads.begin(), heads.end(), [](const Head& a, const Head& b) { return a.place < b.place; });
    for (const Head& each : heads) {
        Head head{};
        auto* into = reinterpret_cast<unsigned char*>(&head);
        read(bucket, each.size, head_size, room, [&](const unsigned char* bytes, std::size_t there) {
            std::memcpy(into, bytes, there);
            into += there;
        });
        to.begin(head.size / item_);
        read(bucket, each.size + head_size, head.size, room,
             [&](const unsigned char* bytes, std::size_t there) { to.piece(bytes, there); });
        to.end();
    }
    return position - head_size * bucket.documents;
}

}  // namespace megapoly
