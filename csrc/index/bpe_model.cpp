#include "bpe_model.h"

#include <cstring>

#include "common.h"
#include "normalizer.h"

namespace megapoly {
namespace {

// Walks over the fields of one protocol-buffer message.
class Fields {
public:
    explicit Fields(std::string_view bytes) : at_(bytes) {}

    // Moves to the next field; false at the end.
    bool next() {
        if (at_.empty()) return false;
        const std::uint64_t tag = read_varint();
        number_ = tag >> 3;
        wire_ = static_cast<int>(tag & 7U);
        switch (wire_) {
            case 0: value_ = read_varint(); break;
            case 1: content_ = take(8); break;
            case 2: content_ = take(read_varint()); break;
            case 5: content_ = take(4); break;
            default: refuse();
        }
        return true;
    }

    std::uint64_t number() const noexcept { return number_; }
    std::uint64_t value() const { return require(0), value_; }
    std::string_view text() const { return require(2), content_; }
    float number_of_32_bits() const {
        require(5);
        float value;
        std::memcpy(&value, content_.data(), sizeof(value));
        return value;
    }

private:
    [[noreturn]] static void refuse() { throw DataError("the bytes are not a SentencePiece model"); }

    void require(int wire) const {
        if (wire_ != wire) refuse();
    }

    std::uint64_t read_varint() {
        std::uint64_t value = 0;
        for (unsigned shift = 0; shift < 64; shift += 7) {
            if (at_.empty()) refuse();
            const auto byte = static_cast<unsigned char>(at_.front());
            at_.remove_prefix(1);
            value |= static_cast<std::uint64_t>(byte & 0x7FU) << shift;
            if ((byte & 0x80U) == 0) return value;
        }
        refuse();
    }

    std::string_view take(std::uint64_t size) {
        if (size > at_.size()) refuse();
        const std::string_view content = at_.substr(0, size);
        at_.remove_prefix(size);
        return content;
    }

    std::string_view at_, content_;
    std::uint64_t number_ = 0, value_ = 0;
    int wire_ = 0;
};

Piece parse_piece(std::string_view bytes) {
    Piece piece;
    for (Fields fields(bytes); fields.next();) {
        if (fields.number() == 1) piece.text = fields.text();
        if (fields.number() == 2) piece.score = fields.number_of_32_bits();
        if (fields.number() == 3) {
            if (fields.value() < 1 || fields.value() > 6) throw DataError("a piece of an unknown type");
            piece.type = static_cast<PieceType>(fields.value());
        }
    }
    if (!is_utf8(piece.text)) throw DataError("a piece is not UTF-8");
    return piece;
}

}  // namespace

BpeModel parse_model(std::string_view bytes) {
    BpeModel model;
    for (Fields fields(bytes); fields.next();) {
        if (fields.number() == 1) model.pieces.push_back(parse_piece(fields.text()));
        if (fields.number() == 2)
            for (Fields trainer(fields.text()); trainer.next();) {
                if (trainer.number() == 3) model.model_type = static_cast<std::int64_t>(trainer.value());
                if (trainer.number() == 24) model.whitespace_as_suffix = trainer.value() != 0;
                if (trainer.number() == 35) model.byte_fallback = trainer.value() != 0;
            }
        if (fields.number() == 3)
            for (Fields normalizer(fields.text()); normalizer.next();) {
                if (normalizer.number() == 2) model.character_map = normalizer.text();
                if (normalizer.number() == 3) model.dummy_prefix = normalizer.value() != 0;
                if (normalizer.number() == 4) model.remove_extra_whitespaces = normalizer.value() != 0;
                if (normalizer.number() == 5) model.escape_whitespaces = normalizer.value() != 0;
            }
        if (fields.number() == 5)
            for (Fields denormalizer(fields.text()); denormalizer.next();)
                if (denormalizer.number() == 2) model.decoding_map = denormalizer.text();
    }
    return model;
}

}  // namespace megapoly
