// A SentencePiece model file: the parts of it that encoding needs.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace megapoly {

enum class PieceType { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

struct Piece {
    std::string text;
    float score = 0;
    PieceType type = PieceType::kNormal;
};

struct BpeModel {
    std::vector<Piece> pieces;
    std::int64_t model_type = 1;  // 1 unigram, 2 BPE, 3 word, 4 character
    bool whitespace_as_suffix = false;
    bool byte_fallback = false;
    std::string character_map;  // precompiled: size of a double-array trie (u32), the trie, the replacements
    std::string decoding_map;   // the same, which the library's decoder applies
    bool dummy_prefix = true;
    bool remove_extra_whitespaces = true;
    bool escape_whitespaces = true;
};

// Reads the serialised ModelProto of sentencepiece_model.proto; throws DataError where it is not one.
BpeModel parse_model(std::string_view bytes);

}  // namespace megapoly
