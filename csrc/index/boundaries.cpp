#include "boundaries.h"

#include <algorithm>
#include <utility>

#include "common.h"
#include "gather.h"

namespace megapoly {
namespace {

constexpr std::int64_t kLengths = 34;  // bytes of the header
constexpr std::int64_t kCells = std::int64_t{1} << 18;
constexpr std::int64_t kSmallestCell = 64;
constexpr std::int64_t kMost = std::int64_t{1} << 58;  // of sequences, whose places in a file then fit 64 bits

}  // namespace

Boundaries::Boundaries(IndexFile file) : file_(std::move(file)) {
    if (file_.sequences < 1 || file_.sequences > kMost || file_.documents < 0 || file_.documents > kMost ||
        file_.tokens < 0 || file_.tokens > kMost)
        throw DataError(file_.path + ": cannot have " + std::to_string(file_.sequences) + " sequences, " +
                        std::to_string(file_.documents) + " documents and " + std::to_string(file_.tokens) + " tokens");
    pointers_ = kLengths + 4 * file_.sequences;
    indices_ = pointers_ + 8 * file_.sequences;
    stride_ = std::max(kSmallestCell, (file_.sequences + kCells - 1) / kCells);
    cells_ = (file_.sequences + stride_ - 1) / stride_;
    const auto size = static_cast<std::size_t>(cells_ + 1);
    tokens_ = std::make_unique<std::atomic<std::int64_t>[]>(size);
    documents_ = std::make_unique<std::atomic<std::int64_t>[]>(size);
    kinds_ = std::make_unique<std::atomic<std::uint8_t>[]>(size);
}

void Boundaries::damaged(const char* what, std::int64_t number) const {
    throw DataError(file_.path + ": is damaged at the " + what + " " + std::to_string(number) +
                    "; `megapoly data verify` finds where");
}

template <typename T>
void Boundaries::read(std::int64_t array, std::int64_t first, std::int64_t count, T* into) const {
    constexpr auto item = static_cast<std::int64_t>(sizeof(T));
    read_exactly(file_.path, file_.descriptor, into, static_cast<std::size_t>(count * item), array + first * item);
}

std::int64_t Boundaries::first_sequence(std::int64_t cell) const { return std::min(cell * stride_, file_.sequences); }

std::int64_t Boundaries::first_token(std::int64_t cell) const {
    if (cell == 0) return 0;
    if (cell == cells_) return file_.tokens;
    auto& known = tokens_[static_cast<std::size_t>(cell)];
    std::int64_t value = known.load(std::memory_order_relaxed) - 1;
    if (value >= 0) return value;
    const std::int64_t sequence = first_sequence(cell);
    read(pointers_, sequence, 1, &value);
    if (value < 0 || value % file_.item != 0 || value / file_.item > file_.tokens)
        damaged("pointer of sequence", sequence);
    value /= file_.item;
    known.store(value + 1, std::memory_order_relaxed);
    return value;
}

std::int64_t Boundaries::first_document(std::int64_t cell) const {
    if (cell == cells_) return file_.documents;
    const std::int64_t wanted = first_sequence(cell);
    auto& known = documents_[static_cast<std::size_t>(cell)];
    const std::int64_t value = known.load(std::memory_order_relaxed) - 1;
    if (value >= 0) return value;
    // The last index, number `documents` of the file, is the number of sequences.
    std::int64_t low = 0, high = file_.documents;
    if (wanted > 0 && wanted < file_.documents) {  // mostly a document is a sequence
        std::int64_t pair[2];
        read(indices_, wanted - 1, 2, pair);
        if (pair[0] < wanted && pair[1] >= wanted) low = high = wanted;
    }
    while (low < high) {
        const std::int64_t middle = low + (high - low) / 2;
        std::int64_t sequence;
        read(indices_, middle, 1, &sequence);
        if (sequence < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    known.store(low + 1, std::memory_order_relaxed);
    return low;
}

std::int64_t Boundaries::cell_of(std::int64_t token) const {
    std::int64_t low = 0, high = cells_, low_token = 0, high_token = file_.tokens;
    for (int step = 0; high - low > 1; ++step) {
        std::int64_t middle = low + (high - low) / 2;
        if (step < 6) {  // where documents are alike, a proportion is nearly right; then halves, whatever they are
            const double share = static_cast<double>(token - low_token) / static_cast<double>(high_token - low_token);
            const auto guess = low + static_cast<std::int64_t>(share * static_cast<double>(high - low));
            middle = std::min(std::max(guess, low + 1), high - 1);
        }
        const std::int64_t here = first_token(middle);
        if (here < low_token || here > high_token) damaged("pointer of sequence", first_sequence(middle));
        if (here <= token) {
            low = middle;
            low_token = here;
        } else {
            high = middle;
            high_token = here;
        }
    }
    return low;
}

std::vector<std::int64_t> Boundaries::document_sequences(std::int64_t cell) const {
    const std::int64_t first = first_document(cell), end = first_document(cell + 1);
    if (end < first) damaged("index of document", first);
    std::vector<std::int64_t> sequences(static_cast<std::size_t>(end - first));
    read(indices_, first, end - first, sequences.data());
    std::int64_t before = first_sequence(cell), most = first_sequence(cell + 1);
    if (cell + 1 < cells_) --most;  // at the end of the file there may be documents without a sequence
    for (std::size_t i = 0; i < sequences.size(); ++i) {
        if (sequences[i] < before || sequences[i] > most)
            damaged("index of document", first + static_cast<std::int64_t>(i));
        before = sequences[i];
    }
    return sequences;
}

bool Boundaries::one_each(std::int64_t cell, std::vector<std::int64_t>& begins) const {
    auto& kind = kinds_[static_cast<std::size_t>(cell)];
    if (kind.load(std::memory_order_relaxed) == kOneEach) return true;
    begins = document_sequences(cell);
    const std::int64_t first = first_sequence(cell), count = first_sequence(cell + 1) - first;
    bool each = static_cast<std::int64_t>(begins.size()) == count;
    for (std::int64_t i = 0; each && i < count; ++i) each = begins[static_cast<std::size_t>(i)] == first + i;
    kind.store(each ? kOneEach : kMixed, std::memory_order_relaxed);
    return each;
}

void Boundaries::visit(std::int64_t cell, const std::int32_t* lengths, std::int64_t start, std::int64_t last,
                       std::vector<std::int64_t>& found) const {
    thread_local std::vector<std::int64_t> begins;
    const bool each = one_each(cell, begins);
    const std::int64_t first = first_sequence(cell), count = first_sequence(cell + 1) - first;
    std::int64_t token = first_token(cell), end = token, before = found.empty() ? start : found.back();
    std::int32_t negative = 0;
    for (std::int64_t i = 0; i < count; ++i) {  // apart from what follows: many at a time
        end += lengths[i];
        negative |= lengths[i];
    }
    if (negative < 0)
        damaged("length of sequence", first + (std::find_if(lengths, lengths + count, [](auto n) { return n < 0; }) -
                                               lengths));
    if (end != first_token(cell + 1)) damaged("lengths or pointers after sequence", first);
    std::size_t next = 0;
    for (std::int64_t i = 0; i < count && token <= last; token += lengths[i++]) {
        bool begin = each;
        if (!each)
            for (; next < begins.size() && begins[next] == first + i; ++next) begin = true;
        if (begin && token > before) {
            found.push_back(token);
            before = token;
        }
    }
}

void Boundaries::between(std::int64_t start, std::int64_t last, std::vector<std::int64_t>& found) const {
    if (start < 0 || start >= file_.tokens) throw DataError(file_.path + ": holds no token " + std::to_string(start));
    const std::int64_t begin = cell_of(start);
    std::int64_t end = begin + 1;
    while (end < cells_ && first_token(end) <= last) {
        if (first_token(end) < first_token(end - 1)) damaged("pointer of sequence", first_sequence(end));
        ++end;
    }
    const std::int64_t first = first_sequence(begin), count = first_sequence(end) - first;
    thread_local std::vector<std::int32_t> lengths;
    if (static_cast<std::int64_t>(lengths.size()) < count) lengths.resize(static_cast<std::size_t>(count));
    read(kLengths, first, count, lengths.data());
    for (std::int64_t cell = begin; cell < end; ++cell)
        visit(cell, lengths.data() + first_sequence(cell) - first, start, last, found);
}

}  // namespace megapoly
