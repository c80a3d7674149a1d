// Parsed plans, and their layouts for the sizes that they were called with. Both are immutable, so that several threads
// may run one at once, and few are kept.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <utility>

namespace qkernels {

// The last `most` values that were asked for.
template <typename Key, typename Value>
class Cache {
 public:
  explicit Cache(size_t most) : most_(most) {}

  // Calls make() where the value is missing. What it throws passes through, and nothing is kept. A Key can be made of a
  // Like, and compared with one.
  template <typename Like, typename Make>
  std::shared_ptr<const Value> get(const Like& key, const Make& make) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (auto found = find(key)) return found;
    }
    std::shared_ptr<const Value> made = make();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (auto found = find(key)) return found;  // another thread was faster
    entries_.emplace_front(Key(key), made);
    if (entries_.size() > most_) entries_.pop_back();
    return made;
  }

 private:
  // The values used last stand in front.
  template <typename Like>
  std::shared_ptr<const Value> find(const Like& key) {
    for (auto entry = entries_.begin(); entry != entries_.end(); ++entry)
      if (entry->first == key) {
        entries_.splice(entries_.begin(), entries_, entry);
        return entry->second;
      }
    return nullptr;
  }

  const size_t most_;
  std::mutex mutex_;
  std::list<std::pair<Key, std::shared_ptr<const Value>>> entries_;
};

}  // namespace qkernels
