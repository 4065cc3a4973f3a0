#include "bpe.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <queue>
#include <thread>

#include "bpe_tables.h"
#include "common.h"

namespace megapoly {
namespace {

constexpr std::size_t kLongestPiece = 1024;  // the tables take its square in time
constexpr std::size_t kMostThreads = 1024;
constexpr std::size_t kShort = 24;  // characters up to which looking at all pairs is faster than a heap

// The ids of chunks seen before: a table in which a newer chunk takes the place of an older one.
class Memory {
public:
    static constexpr std::size_t kLongest = 30, kMostIds = 8;

    struct Slot {
        std::uint8_t size = 0, count = 0;
        std::array<char, kLongest> text;
        std::array<std::int32_t, kMostIds> ids;
    };

    // `bits` is the binary logarithm of the number of chunks, 15 at most.
    explicit Memory(unsigned bits) : shift_(64 - bits), slots_(std::size_t{1} << bits) {}

    Slot& slot(std::string_view text) noexcept {
        std::uint64_t hash = text.size(), word = 0;
        for (; text.size() > 8; text.remove_prefix(8)) {
            std::memcpy(&word, text.data(), 8);
            hash = (hash ^ word) * 0x9E3779B97F4A7C15ULL;
            hash ^= hash >> 29;
        }
        word = 0;
        std::memcpy(&word, text.data(), text.size());
        hash = (hash ^ word) * 0x9E3779B97F4A7C15ULL;
        return slots_[hash >> shift_];
    }

private:
    unsigned shift_;
    std::vector<Slot> slots_;
};

class Worker {
public:
    Worker(const Normalizer& normalizer, const BpeTables& tables, unsigned memory_bits)
        : normalizer_(normalizer), tables_(tables), memory_(memory_bits) {}

    // Appends the ids of one text.
    void encode(std::string_view text, std::vector<std::int32_t>& ids) {
        const std::size_t from = ids.size();
        normalizer_.normalize(text, normal_);
        const std::string_view all = normal_;
        std::size_t start = 0, at = 0;
        std::uint32_t before = 0;
        while (at < all.size()) {
            const Character here = decode(all.data() + at);
            if (at > start && !tables_.may_touch(before, here.code)) {
                encode_chunk(all.substr(start, at - start), ids);
                start = at;
            }
            before = here.code;
            at += here.length;
        }
        if (at > start) encode_chunk(all.substr(start), ids);
        tables_.join_unknown(ids, from);
    }

private:
    void encode_chunk(std::string_view chunk, std::vector<std::int32_t>& ids) {
        const Character first = decode(chunk.data());
        if (first.length == chunk.size()) return tables_.emit(tables_.node(first.code), chunk, ids);
        if (chunk.size() > Memory::kLongest) return merge(chunk, ids);
        Memory::Slot& slot = memory_.slot(chunk);
        if (slot.size != chunk.size() || std::memcmp(slot.text.data(), chunk.data(), chunk.size()) != 0) {
            const std::size_t from = ids.size();
            merge(chunk, ids);
            const std::size_t count = ids.size() - from;
            if (count > Memory::kMostIds) return;
            slot.size = static_cast<std::uint8_t>(chunk.size());
            slot.count = static_cast<std::uint8_t>(count);
            std::memcpy(slot.text.data(), chunk.data(), chunk.size());
            std::copy_n(ids.begin() + static_cast<std::ptrdiff_t>(from), count, slot.ids.begin());
            return;
        }
        ids.insert(ids.end(), slot.ids.begin(), slot.ids.begin() + slot.count);
    }

    void merge(std::string_view chunk, std::vector<std::int32_t>& ids) {
        nodes_.clear();
        starts_.clear();
        for (std::size_t at = 0; at < chunk.size();) {
            const Character here = decode(chunk.data() + at);
            const std::int32_t node = tables_.node(here.code);
            if (!nodes_.empty()) tables_.expect(nodes_.back(), node);
            nodes_.push_back(node);
            starts_.push_back(at);
            at += here.length;
        }
        const std::size_t left = nodes_.size() <= kShort ? merge_short() : merge_long();
        starts_.resize(left);
        starts_.push_back(chunk.size());
        for (std::size_t i = 0; i < left; ++i)
            tables_.emit(nodes_[i], chunk.substr(starts_[i], starts_[i + 1] - starts_[i]), ids);
    }

    // Both merge nodes_ and starts_ in place and return how many are left.
    std::size_t merge_short() {
        std::array<BpeTables::Merge, kShort> pairs;
        std::size_t count = nodes_.size();
        for (std::size_t i = 0; i + 1 < count; ++i) pairs[i] = tables_.merge(nodes_[i], nodes_[i + 1]);
        while (count > 1) {
            std::size_t best = 0;
            for (std::size_t i = 1; i + 1 < count; ++i)
                if (pairs[i].rank < pairs[best].rank) best = i;
            if (pairs[best].rank == BpeTables::kNoMerge) break;
            nodes_[best] = pairs[best].node;
            if (best > 0) tables_.expect(nodes_[best - 1], nodes_[best]);
            if (best + 2 < count) tables_.expect(nodes_[best], nodes_[best + 2]);
            for (std::size_t i = best + 1; i + 1 < count; ++i) {
                nodes_[i] = nodes_[i + 1];
                starts_[i] = starts_[i + 1];
                pairs[i] = pairs[i + 1];
            }
            --count;
            if (best > 0) pairs[best - 1] = tables_.merge(nodes_[best - 1], nodes_[best]);
            if (best + 1 < count) pairs[best] = tables_.merge(nodes_[best], nodes_[best + 1]);
        }
        return count;
    }

    std::size_t merge_long() {
        const std::size_t count = nodes_.size();
        if (count >= BpeTables::kNoMerge) throw DataError("a text of more than 4 billion characters in a row");
        next_.resize(count);
        previous_.resize(count);
        pairs_.resize(count);
        heap_.clear();
        const auto look = [&](std::size_t i) {
            pairs_[i] = next_[i] < count ? tables_.merge(nodes_[i], nodes_[next_[i]]) : BpeTables::Merge{};
            return pairs_[i].rank != BpeTables::kNoMerge;
        };
        const auto entry = [&](std::size_t i) { return static_cast<std::uint64_t>(pairs_[i].rank) << 32 | i; };
        for (std::size_t i = 0; i < count; ++i) {
            next_[i] = i + 1;
            previous_[i] = i - 1;  // of the first one: beyond `count`
            if (look(i)) heap_.push_back(entry(i));
        }
        std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
        const auto push = [&](std::size_t i) {
            if (!look(i)) return;
            heap_.push_back(entry(i));
            std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
        };
        while (!heap_.empty()) {
            std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
            const std::size_t i = heap_.back() & 0xFFFFFFFFU;
            const auto rank = static_cast<std::uint32_t>(heap_.back() >> 32);
            heap_.pop_back();
            if (pairs_[i].rank != rank) continue;  // one of the two has been merged since
            const std::size_t gone = next_[i];
            nodes_[i] = pairs_[i].node;
            next_[i] = next_[gone];
            pairs_[gone].rank = BpeTables::kNoMerge;
            next_[gone] = gone;  // no longer part of the text
            if (next_[i] < count) {
                previous_[next_[i]] = i;
                tables_.expect(nodes_[i], nodes_[next_[i]]);
            }
            if (previous_[i] < count) tables_.expect(nodes_[previous_[i]], nodes_[i]);
            push(i);
            if (previous_[i] < count) push(previous_[i]);
        }
        std::size_t left = 0;
        for (std::size_t i = 0; i < count; i = next_[i], ++left) {
            nodes_[left] = nodes_[i];
            starts_[left] = starts_[i];
        }
        return left;
    }

    const Normalizer& normalizer_;
    const BpeTables& tables_;
    Memory memory_;
    std::string normal_;
    std::vector<std::int32_t> nodes_;
    std::vector<std::size_t> starts_, next_, previous_;
    std::vector<BpeTables::Merge> pairs_;
    std::vector<std::uint64_t> heap_;
};

std::string why_not(const BpeModel& model) {
    if (model.model_type != 2) return "it is not a byte-pair model";
    std::array<bool, 256> bytes{};
    for (const Piece& piece : model.pieces) {
        const auto shown = [&] { return "its piece '" + piece.text + "' "; };
        const std::size_t characters = characters_in(piece.text);
        if (characters == 0 || !std::isfinite(piece.score)) return shown() + "is empty or has no score";
        if (piece.text.find('\0') != std::string::npos) return "a piece holds a zero byte";  // which ends it in the library
        if (piece.text.size() > kLongestPiece) return "a piece is longer than " + std::to_string(kLongestPiece) + " bytes";
        if (piece.type == PieceType::kUserDefined) return shown() + "is a user-defined symbol";
        if (piece.type == PieceType::kUnused) return shown() + "is marked unused";
        if (piece.type == PieceType::kByte) {
            const int byte = byte_of(piece.text);
            if (byte < 0) return shown() + "is marked as a byte and is none";
            bytes[static_cast<std::size_t>(byte)] = true;
        } else if (piece.type != PieceType::kNormal && characters == 1) {
            return shown() + "stands for a character and is none";
        }
    }
    if (model.byte_fallback && std::find(bytes.begin(), bytes.end(), false) != bytes.end())
        return "it falls back to bytes and lacks some of them";
    return "";
}

}  // namespace

BpeEncoder::BpeEncoder(std::string_view model) {
    const BpeModel parsed = parse_model(model);
    normalizer_ = std::make_unique<const Normalizer>(parsed);
    CharacterMap{parsed.decoding_map};
    refusal_ = why_not(parsed);
    if (!refusal_.empty()) return;
    tables_ = std::make_unique<const BpeTables>(parsed);
}

BpeEncoder::~BpeEncoder() = default;
BpeEncoder::BpeEncoder(BpeEncoder&&) noexcept = default;

void BpeEncoder::encode(const std::vector<std::string_view>& texts, int threads, std::vector<std::int32_t>& ids,
                        std::vector<std::int64_t>& lengths) const {
    if (!refusal_.empty()) throw DataError("the model cannot be used by this encoder: " + refusal_);
    std::size_t total = 0;
    for (const std::string_view text : texts) total += text.size();
    const std::size_t parts =
        std::max<std::size_t>(1, std::min({static_cast<std::size_t>(std::max(threads, 1)), texts.size(), kMostThreads}));
    std::vector<std::size_t> cuts{0};  // parts of about as many bytes
    std::size_t seen = 0;
    for (std::size_t i = 0; i < texts.size(); ++i) {
        seen += texts[i].size();
        while (cuts.size() < parts && seen * parts >= total * cuts.size()) cuts.push_back(i + 1);
    }
    while (cuts.size() <= parts) cuts.push_back(texts.size());
    lengths.assign(texts.size(), 0);
    std::vector<std::vector<std::int32_t>> found(parts);
    std::vector<std::exception_ptr> errors(parts);
    const auto run = [&](std::size_t part) {
        try {
            Worker worker(*normalizer_, *tables_, total < (1U << 16) ? 8 : 15);
            for (std::size_t i = cuts[part]; i < cuts[part + 1]; ++i) {
                const std::size_t before = found[part].size();
                worker.encode(texts[i], found[part]);
                lengths[i] = static_cast<std::int64_t>(found[part].size() - before);
            }
        } catch (...) {
            errors[part] = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    others.reserve(parts);
    std::size_t started = 1;
    try {
        for (; started < parts; ++started) others.emplace_back(run, started);
    } catch (const std::exception&) {  // the system gives no more threads: this one does the rest
    }
    run(0);
    for (std::size_t part = started; part < parts; ++part) run(part);
    for (std::thread& other : others) other.join();
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
    ids = std::move(found[0]);
    for (std::size_t part = 1; part < parts; ++part) ids.insert(ids.end(), found[part].begin(), found[part].end());
}

}  // namespace megapoly
