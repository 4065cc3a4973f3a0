// Rows of a batch from windows of several datasets: tokens, labels, positions and the lengths of documents.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "boundaries.h"
#include "gather.h"

namespace megapoly {

// A descriptor of one's own for a file that is open for reading.
class Descriptor {
public:
    Descriptor(const std::string& path, int opened);
    ~Descriptor();
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int number() const noexcept { return number_; }

private:
    int number_;
};

// One dataset, as batches are read from it. It does not depend on who opened its files.
class Dataset {
public:
    // `bin` and `idx` are descriptors; code, sequences and documents are those of the header of the .idx. `padding` is
    // the id that fills what is left of packs, -1 where nothing does. Where `marked` is not 0, it is the number of
    // tokens, and an id from there on stands for a token that is to be learned and is as much less; lower ids are not
    // to be learned.
    Dataset(std::string bin_path, int bin, int code, std::int64_t tokens, std::string idx_path, int idx,
            std::int64_t sequences, std::int64_t documents, std::int64_t padding, std::int64_t marked);

    // `vocabulary` of the model; throws DataError where the tokens of a marked dataset are more.
    Tokens tokens(std::int64_t vocabulary) const;
    std::int64_t marked() const noexcept { return marked_; }
    std::int64_t count() const noexcept { return count_; }
    const std::string& path() const noexcept { return bin_path_; }
    // The token that fills what is left of packs.
    std::int64_t padding() const noexcept { return padding_; }
    const Boundaries& boundaries() const noexcept { return boundaries_; }

private:
    std::string bin_path_;
    Descriptor bin_, idx_;
    int code_;
    std::int64_t count_, padding_, marked_;
    Boundaries boundaries_;
};

// What to read: row i is the window of the batch's length from token starts[i] of sources[source[i]]; of a window that
// reaches beyond limits[i], only what is before it. A source of -1 is a row of padding.
struct Windows {
    const std::vector<const Dataset*>& sources;
    const std::int32_t* source;
    const std::int64_t* starts;
    const std::int64_t* limits;
    std::int64_t rows;
    std::int64_t length;
    std::int64_t vocabulary;
    bool all;  // tokens of marked datasets that are not to be learned are labels too
};

// What to fill, each [rows, length]; null tokens and labels are left out. Id is std::int32_t or std::int64_t.
template <typename Id>
struct Columns {
    Id* tokens;
    Id* labels;
    Id* positions;
};

// How far a batch is, for another thread to look at while the disk is waited for.
struct Progress {
    std::atomic<std::int64_t> source{-1};  // that is being read
    std::atomic<std::int64_t> bytes{0};    // read so far, over all batches
};

// Labels are the tokens after each; what there is none of is token 0 and label -1. With `cu_seqlens`, positions begin
// again in every document, no label crosses from one into the next, and the vector becomes 0 and then the end of every
// document's part of a row, counted over all rows; the last document of a row, where it begins with the padding of its
// dataset and is not the first, has no labels. Else positions count from the beginning of the window. Throws DataError
// for a window or a document that is not in its file, or an id outside the vocabulary.
template <typename Id>
void fill(const Windows& windows, const Columns<Id>& out, std::vector<std::int32_t>* cu_seqlens, Progress& progress);

}  // namespace megapoly
