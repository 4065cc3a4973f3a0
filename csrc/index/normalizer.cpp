#include "normalizer.h"

#include <cstring>

#include "common.h"

namespace megapoly {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD", kMark = "\xE2\x96\x81";
constexpr int kMostMatches = 32;  // SentencePiece looks no further along one path of the trie

bool ends_with(std::string_view text, std::string_view end) noexcept {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

// One unit of the double array of the darts-clone library.
struct Unit {
    std::uint32_t bits;
    bool has_leaf() const noexcept { return ((bits >> 8) & 1U) != 0; }
    std::uint32_t value() const noexcept { return bits & 0x7FFFFFFFU; }
    std::uint32_t label() const noexcept { return bits & (0x80000000U | 0xFFU); }
    std::uint32_t offset() const noexcept { return (bits >> 10) << ((bits & (1U << 9)) >> 6); }
};

[[noreturn]] void refuse_map() { throw DataError("its map of characters is damaged"); }

}  // namespace

std::size_t character_length(std::string_view text) noexcept {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    const auto trail = [&](std::size_t i) { return (byte(i) & 0xC0U) == 0x80U; };
    if (text.empty()) return 0;
    const unsigned char lead = byte(0);
    if (lead < 0x80) return 1;
    if (lead >= 0xC2 && lead <= 0xDF) return text.size() >= 2 && trail(1) ? 2 : 0;
    if ((lead & 0xF0U) == 0xE0) {
        if (text.size() < 3 || !trail(1) || !trail(2)) return 0;
        const bool overlong = lead == 0xE0 && byte(1) < 0xA0, surrogate = lead == 0xED && byte(1) >= 0xA0;
        return overlong || surrogate ? 0 : 3;
    }
    if (lead < 0xF0 || lead > 0xF4 || text.size() < 4 || !trail(1) || !trail(2) || !trail(3)) return 0;
    const bool overlong = lead == 0xF0 && byte(1) < 0x90, beyond = lead == 0xF4 && byte(1) >= 0x90;
    return overlong || beyond ? 0 : 4;
}

bool is_utf8(std::string_view text) noexcept {
    while (!text.empty()) {
        const std::size_t length = character_length(text);
        if (length == 0) return false;
        text.remove_prefix(length);
    }
    return true;
}

CharacterMap::CharacterMap(std::string_view map) {
    if (map.empty()) return;
    std::uint32_t size = 0;
    if (map.size() > sizeof(size)) std::memcpy(&size, map.data(), sizeof(size));
    if (size < sizeof(std::uint32_t) || size % sizeof(std::uint32_t) != 0 || size >= map.size() - sizeof(size))
        refuse_map();
    trie_.resize(size / sizeof(std::uint32_t));
    std::memcpy(trie_.data(), map.data() + sizeof(size), size);
    replacements_ = map.substr(sizeof(size) + size);
    if (replacements_.back() != '\0' || !is_utf8(replacements_)) refuse_map();
    check_paths();
}

// From a node, every byte leads to another place in its row of 256 units.
void CharacterMap::check_paths() const {
    std::vector<bool> seen(trie_.size());
    std::vector<std::uint32_t> waiting{Unit{trie_[0]}.offset()};
    while (!waiting.empty()) {
        const std::uint32_t node = waiting.back();
        waiting.pop_back();
        if ((node | 0xFFU) >= trie_.size()) refuse_map();
        if (seen[node]) continue;
        seen[node] = true;
        for (std::uint32_t key = 0; key < 256; ++key) {
            const Unit unit{trie_[node ^ key]};
            if (unit.label() != key) continue;
            const std::uint32_t next = node ^ key ^ unit.offset();
            waiting.push_back(next);
            if (!unit.has_leaf()) continue;
            if (next >= trie_.size()) refuse_map();
            const std::size_t at = Unit{trie_[next]}.value();
            if (at >= replacements_.size() || (replacements_[at] & 0xC0) == 0x80) refuse_map();
        }
    }
}

CharacterMap::Found CharacterMap::find(std::string_view text) const noexcept {
    if (trie_.empty()) return {{}, 0};
    std::size_t longest = 0;
    std::uint32_t value = 0, node = Unit{trie_[0]}.offset();
    int matches = 0;
    for (std::size_t i = 0; i < text.size() && matches < kMostMatches; ++i) {
        const auto key = static_cast<unsigned char>(text[i]);
        node ^= key;
        const Unit unit{trie_[node]};
        if (unit.label() != key) break;
        node ^= unit.offset();
        if (!unit.has_leaf()) continue;
        longest = i + 1;
        value = Unit{trie_[node]}.value();
        ++matches;
    }
    if (longest == 0) return {{}, 0};
    return {std::string_view(replacements_.c_str() + value), longest};
}

Normalizer::Normalizer(const BpeModel& model)
    : suffix_(model.whitespace_as_suffix),
      dummy_prefix_(model.dummy_prefix),
      remove_extra_(model.remove_extra_whitespaces),
      escape_(model.escape_whitespaces),
      map_(model.character_map) {}

CharacterMap::Found Normalizer::first(std::string_view text) const {
    if (const CharacterMap::Found found = map_.find(text); found.consumed > 0) return found;
    const std::size_t length = character_length(text);
    if (length == 0) return {kReplacement, 1};
    return {text.substr(0, length), length};
}

void Normalizer::append(std::string_view text, std::string& out) const {
    for (const char byte : text) {
        if (escape_ && byte == ' ')
            out.append(kMark);
        else
            out.push_back(byte);
    }
}

void Normalizer::normalize(std::string_view text, std::string& out) const {
    out.clear();
    if (remove_extra_)
        while (!text.empty()) {
            const CharacterMap::Found step = first(text);
            if (step.text != " ") break;
            text.remove_prefix(step.consumed);
        }
    if (text.empty()) return;
    const std::string_view space = escape_ ? kMark : std::string_view(" ");
    if (dummy_prefix_ && !suffix_) out.append(space);
    bool after_space = remove_extra_;
    while (!text.empty()) {
        if (map_.empty() && !after_space) {  // a run of ASCII that stays as it is
            std::size_t run = 0;
            while (run < text.size() && static_cast<unsigned char>(text[run]) < 0x80 && text[run] != ' ') ++run;
            out.append(text.substr(0, run));
            text.remove_prefix(run);
            if (text.empty()) break;
        }
        const CharacterMap::Found step = first(text);
        std::string_view part = step.text;
        while (after_space && !part.empty() && part.front() == ' ') part.remove_prefix(1);
        if (!part.empty()) {
            append(part, out);
            after_space = remove_extra_ && part.back() == ' ';
        }
        text.remove_prefix(step.consumed);
    }
    if (remove_extra_)
        while (ends_with(out, space)) out.resize(out.size() - space.size());
    if (dummy_prefix_ && suffix_) out.append(space);
}

}  // namespace megapoly
