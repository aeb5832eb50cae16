// Pages of 2 MB, and which of memory's are such as far as known. In pages of 4 KB the rows of a product lie in a page each, which costs a look into the
// page table for every step of its depth, and the CPU's prefetchers end with a page.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "torch.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

namespace fastft::binding {
namespace {

constexpr uintptr_t kPage = kHugePage, kPages = uintptr_t(1) << 26;  // 47 bits of addresses
constexpr int kFailures = 8;  // pages after which collapsing gives up: each may search all memory for a free one

// A bit for each page of the address space; nearly all of these 8 MB are never touched. Bits stay set where memory is given back: if it comes again
// in small pages, products choose what is 2 % slower there.
std::atomic<uint64_t> marks[kPages / 64];

void mark(uintptr_t begin, uintptr_t end) {
  for (uintptr_t page = begin / kPage; page < end / kPage && page < kPages; ++page)
    marks[page / 64].fetch_or(uint64_t(1) << page % 64, std::memory_order_relaxed);
}

bool is_marked(uintptr_t page) {
  return page < kPages && (marks[page / 64].load(std::memory_order_relaxed) >> page % 64 & 1);
}

// Whether the system's owner has not forbidden it.
bool may_have_huge_pages() {
  static const bool may = [] {
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string modes;
    return std::getline(file, modes) && modes.find("[never]") == std::string::npos;
  }();
  return may;
}

// Makes the pages between two of their borders huge ones, contents and addresses as they are, and marks those that are.
void collapse(uintptr_t begin, uintptr_t end, int& failures) {
  if (failures >= kFailures) return;
  if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_COLLAPSE) == 0) return mark(begin, end);
  if (end - begin == kPage) return void(++failures);
  const uintptr_t middle = begin + (end - begin) / kPage / 2 * kPage;
  collapse(begin, middle, failures);
  collapse(middle, end, failures);
}

void huge_pages(std::vector<Tensor> tensors, bool written) {
  if (!may_have_huge_pages()) return;
  std::vector<std::pair<uintptr_t, uintptr_t>> spans;
  for (const Tensor& tensor : tensors) {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()),
               end = begin + uintptr_t(tensor.numel()) * tensor.element_size();
    if (written)
      spans.emplace_back(begin / kPage * kPage, (end + kPage - 1) / kPage * kPage);
    else
      advise_huge_pages(reinterpret_cast<void*>(begin), end - begin, true);
  }
  std::sort(spans.begin(), spans.end());
  int failures = 0;
  for (size_t i = 0, next; i < spans.size(); i = next) {  // neighbours at once: a call waits for all CPUs
    auto [begin, end] = spans[i];
    for (next = i + 1; next < spans.size() && spans[next].first <= end; ++next) end = std::max(end, spans[next].second);
    collapse(begin, end, failures);
  }
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes, bool is_new) {
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage,
                  end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (first >= end || !may_have_huge_pages()) return;
  if (madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE) == 0 && is_new) mark(first, end);
}

size_t in_small_pages(const void* data, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  size_t small = 0;
  for (uintptr_t page = begin / kPage; page * kPage < end; ++page)
    if (!is_marked(page)) small += std::min(end, (page + 1) * kPage) - std::max(begin, page * kPage);
  return small;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastft, m) { m.def("huge_pages(Tensor[] tensors, bool written) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fastft, CompositeExplicitAutograd, m) { m.impl("huge_pages", TORCH_BOX(&huge_pages)); }

}  // namespace fastft::binding
