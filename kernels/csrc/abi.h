// What Python's structures are compared with before anything is called: a version, then the sizes of those of C++.

#pragma once

#include <cstdint>
#include <iterator>

constexpr int64_t ABI_VERSION = 1;  // raise it, here and in compiler.py, when a structure or a function changes

#define EXPORT_ABI(...)                                                       \
    extern "C" int64_t abi(int64_t i) {                                       \
        static const int64_t numbers[] = {ABI_VERSION, __VA_ARGS__};          \
        return i < static_cast<int64_t>(std::size(numbers)) ? numbers[i] : 0; \
    }
