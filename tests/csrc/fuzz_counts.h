// Random texts, classes and exceptions to csrc/text_counts and csrc/clean_lines.
#pragma once

#include <stdint.h>
#include <string.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "clean_lines/op.h"
#include "text_counts/op.h"

namespace {

// Bytes in a block of exactly their size.
struct Bytes {
  explicit Bytes(const std::string& text) : data(new uint8_t[text.size()]) {
    if (!text.empty()) memcpy(data.get(), text.data(), text.size());
  }
  std::unique_ptr<uint8_t[]> data;
};

// Strings of a few characters as codes, with the places where they end.
struct Strings {
  std::vector<uint32_t> codes;
  std::vector<int64_t> ends;
  void add(std::initializer_list<uint32_t> one) {
    codes.insert(codes.end(), one);
    ends.push_back(int64_t(codes.size()));
  }
};

std::string random_text(std::mt19937_64& rng) {
  static const char* const kPieces[] = {"a",
                                        "B",
                                        "1",
                                        ".",
                                        "...",
                                        " ",
                                        "  ",
                                        "\n",
                                        "\r\n",
                                        "'",
                                        "can't",
                                        ":)",
                                        ":",
                                        ")",
                                        "-",
                                        "--",
                                        "http://",
                                        "a.bc",
                                        "@",
                                        "\xE2\x80\xA6",
                                        "\xE4\xB8\xAD",
                                        "\xC3",
                                        "\xF0\x9F",
                                        "\xFF",
                                        "[1]",
                                        "[edit]",
                                        "{",
                                        "lorem ipsum",
                                        "use cookies",
                                        "10km",
                                        "$",
                                        "1.2.3.4",
                                        "_",
                                        "/",
                                        "\xC2\xB0"
                                        "C."};
  std::string text;
  for (uint64_t left = rng() % 24; left > 0; --left) {
    if (rng() % 8 == 0) {
      text += char(rng());
    } else {
      text += kPieces[rng() % (sizeof(kPieces) / sizeof(kPieces[0]))];
    }
  }
  return text;
}

// Whether every count is within its bounds.
bool fuzz_counts(std::mt19937_64& rng) {
  static const std::vector<uint32_t> classes = [] {
    std::vector<uint32_t> made(0x5000);
    std::mt19937_64 chance(3);
    for (uint32_t code = 0; code < made.size(); ++code) made[code] = uint32_t(chance() & chance() & 0x1FFFFF) & ~3u;
    for (uint32_t code : {9u, 10u, 13u, 32u}) made[code] = megalm::kSpace;
    made[10] = made[13] = megalm::kSpace | megalm::kLineBreak;
    for (uint32_t code = 'a'; code <= 'z'; ++code) made[code] |= megalm::kPlain | megalm::kLower;
    for (uint32_t code = 0; code < made.size(); ++code)
      if (!(code >= 'a' && code <= 'z')) made[code] &= ~uint32_t(megalm::kPlain);
    return made;
  }();
  static const Strings exceptions = [] {
    Strings made;
    made.add({'c', 'a', 'n', '\'', 't'});
    made.add({':', ')'});
    made.add({')', ':'});
    made.add({'B', '.'});
    return made;
  }();
  static const std::vector<uint8_t> pieces = {2, 3, 2, 2, 2};
  static const std::vector<int64_t> piece_ends = {2, 3, 4, 5};
  static const Strings units = [] {
    Strings made;
    made.add({'k', 'm'});
    made.add({'$'});
    return made;
  }();
  const int64_t texts = int64_t(rng() % 4);
  std::string all;
  std::unique_ptr<int64_t[]> ends(new int64_t[size_t(texts)]), out_ends(new int64_t[size_t(texts)]);
  for (int64_t i = 0; i < texts; ++i) {
    all += random_text(rng);
    ends[size_t(i)] = int64_t(all.size());
  }
  const Bytes data(all);
  std::unique_ptr<int64_t[]> counts(new int64_t[size_t(texts * megalm::kTextCounts)]);
  megalm::text_counts({data.data.get(), ends.get(), texts, classes.data(), int64_t(classes.size()),
                       exceptions.codes.data(), exceptions.ends.data(), int64_t(exceptions.ends.size()), pieces.data(),
                       piece_ends.data(), units.codes.data(), units.ends.data(), int64_t(units.ends.size()),
                       units.codes.data(), units.ends.data(), int64_t(units.ends.size()), int64_t(rng() % 20),
                       counts.get()});
  std::unique_ptr<uint8_t[]> out(new uint8_t[all.size()]);
  std::unique_ptr<int64_t[]> lines(new int64_t[size_t(texts * megalm::kLineCounts)]);
  megalm::clean_lines({data.data.get(), ends.get(), texts, classes.data(), int64_t(classes.size()),
                       exceptions.codes.data(), exceptions.ends.data(), int64_t(exceptions.ends.size()), pieces.data(),
                       piece_ends.data(), units.codes.data(), units.ends.data(), int64_t(units.ends.size()),
                       int64_t(rng() % 9), int64_t(rng() % 3), rng() % 2 == 0, out.get(), out_ends.get(), lines.get()});
  for (int64_t i = 0; i < texts; ++i) {
    const int64_t begin = i > 0 ? ends[size_t(i) - 1] : 0, bytes = ends[size_t(i)] - begin;
    const int64_t* c = counts.get() + i * megalm::kTextCounts;
    for (int column = 0; column < megalm::kTextCounts; ++column) {
      const int64_t most =
          column >= megalm::kTop2Characters && column <= megalm::kTop4Characters ? 4 * bytes + 4 : bytes + 1;
      if (c[column] < 0 || c[column] > most) return false;
    }
    if (c[megalm::kPlainWords] > c[megalm::kWords] || c[megalm::kAlphabeticWords] > c[megalm::kWords]) return false;
    if (c[megalm::kPlainWordCharacters] > c[megalm::kCharacters] || c[megalm::kRepeated5Characters] > bytes)
      return false;
    if (c[megalm::kFilledLines] > c[megalm::kNewlines] + 1 || c[megalm::kBulletLines] > c[megalm::kLines]) return false;
    if (out_ends[size_t(i)] > ends[size_t(i)] || out_ends[size_t(i)] < (i > 0 ? out_ends[size_t(i) - 1] : 0))
      return false;
    const int64_t* l = lines.get() + i * megalm::kLineCounts;
    if (l[megalm::kStayingLines] < 0 || l[megalm::kStayingLines] > c[megalm::kLines]) return false;
  }
  return true;
}

}  // namespace
