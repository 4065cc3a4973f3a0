#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "common.h"

namespace megapoly {
namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 62;

[[noreturn]] void no_plan(const char* what) { throw std::invalid_argument(std::string("no plan: ") + what); }

}  // namespace

Slots::Slots(const std::int64_t* quotas, std::size_t sources, std::int64_t block, std::uint64_t key)
    : ends_(sources), counts_(sources), block_(block), places_(key, block) {
    std::int64_t end = 0;
    for (std::size_t i = 0; i < sources; ++i) {
        if (quotas[i] < 0 || quotas[i] > block - end) no_plan("quotas that do not sum to the block");
        ends_[i] = end += quotas[i];
    }
    if (end != block) no_plan("quotas that do not sum to the block");
}

// The first source whose quotas end behind the slot's place, by halves and without a branch to guess.
std::size_t Slots::source_at(std::int64_t slot) const noexcept {
    const std::int64_t place = places_(slot);
    std::size_t low = 0;
    for (std::size_t size = ends_.size(); size > 1;) {
        const std::size_t half = size / 2;
        low += ends_[low + half - 1] <= place ? half : 0;
        size -= half;
    }
    return low;
}

void Slots::move_to(std::int64_t slot) {
    if (slot < 0 || slot > block_) throw std::invalid_argument("a slot outside its block");
    const std::int64_t steps = std::abs(slot - slot_);
    if (slot < steps) {
        std::fill(counts_.begin(), counts_.end(), 0);
        slot_ = 0;
    } else if (block_ - slot < steps) {
        std::adjacent_difference(ends_.begin(), ends_.end(), counts_.begin());
        slot_ = block_;
    }
    for (; slot_ < slot; ++slot_) ++counts_[source_at(slot_)];
    while (slot_ > slot) --counts_[source_at(--slot_)];
}

Plan::Plan(std::int64_t samples, SegmentTable segments, std::vector<std::int64_t> windows, std::string block_text,
           std::vector<std::string> epoch_texts)
    : samples_(samples),
      segments_(std::move(segments)),
      windows_(std::move(windows)),
      block_text_(std::move(block_text)),
      epoch_texts_(std::move(epoch_texts)),
      epochs_(windows_.size()) {
    const auto& [first, block, quotas, starts] = segments_;
    const std::size_t count = first.size(), sources = windows_.size();
    if (count == 0 || sources == 0 || block.size() != count || quotas.size() != count * sources ||
        starts.size() != count * sources || epoch_texts_.size() != sources)
        no_plan("columns of different lengths");
    if (first[0] != 0 || samples < 1 || samples > kMost) no_plan("samples that do not begin with 0, or are not 1 to 2^62");
    for (std::size_t g = 0; g < count; ++g) {
        const std::int64_t length = (g + 1 < count ? first[g + 1] : samples) - first[g];
        if (length < 1) no_plan("segments that do not ascend");
        std::int64_t left = block[g];
        for (std::size_t i = g * sources; i < (g + 1) * sources; ++i) {
            if (quotas[i] < 0 || quotas[i] > left) no_plan("quotas that do not sum to their block");
            left -= quotas[i];
            if (starts[i] < 0 || starts[i] > kMost - length) no_plan("starts from 0 to 2^62 - samples");
            if (quotas[i] > 0 && windows_[i - g * sources] < 1) no_plan("a source without windows");
        }
        if (left != 0 || block[g] < 1) no_plan("quotas that do not sum to their block");
    }
}

void Plan::locate(const std::int64_t* samples, std::size_t count, const Places& out) const {
    if (count == 0) return;
    const auto [least, most] = std::minmax_element(samples, samples + count);
    if (*least < 0 || *most >= samples_)
        throw DataError("plan: samples " + std::to_string(*least) + " to " + std::to_string(*most) +
                        " were asked for, but it ends after " + std::to_string(samples_) +
                        " samples; train for fewer tokens or add a stage");
    const std::lock_guard<std::mutex> held(lock_);
    if (std::is_sorted(samples, samples + count)) {
        for (std::size_t i = 0; i < count; ++i) locate_one(samples[i], out, i);
        return;
    }
    std::vector<std::size_t> order(count);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return samples[a] < samples[b]; });
    for (const std::size_t i : order) locate_one(samples[i], out, i);
}

void Plan::locate_one(std::int64_t sample, const Places& out, std::size_t at) const {
    const auto& [first, blocks, quotas, starts] = segments_;
    const std::size_t sources = windows_.size();
    const auto g = static_cast<std::size_t>(std::upper_bound(first.begin(), first.end(), sample) - first.begin() - 1);
    const std::int64_t block = blocks[g], number = (sample - first[g]) / block, origin = first[g] + number * block;
    if (!slots_ || origin != origin_) {
        slots_.emplace(&quotas[g * sources], sources, block, key_of(block_text_ + std::to_string(origin) + "]"));
        origin_ = origin;
    }
    slots_->move_to(sample - origin);
    const std::size_t source = slots_->source(), column = g * sources + source;
    const std::int64_t count = starts[column] + number * quotas[column] + slots_->counts()[source];
    const std::int64_t windows = windows_[source], epoch = count / windows;
    Epoch& known = epochs_[source];
    if (known.number != epoch)
        known = {epoch, Permutation(key_of(epoch_texts_[source] + std::to_string(epoch) + "]"), windows)};
    out.source[at] = static_cast<std::int32_t>(source);
    out.window[at] = known.windows(count - epoch * windows);
    out.epoch[at] = epoch;
    out.count[at] = count;
}

}  // namespace megapoly
