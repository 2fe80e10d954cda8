// What is compiled for several instruction sets, for the extensions that choose among them at run time.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "rans.h"
#include "restore.h"

namespace restore {

struct Version {
    std::string name;
    rans::DecodeBlocks decode;
    Multiply multiply;
    Rotate rotate;
    Narrow bfloat16, float16;
};

inline std::vector<Version> versions() {
    std::vector<Version> found;
#ifdef RESTORE_X86
    if (isa::avx512())
        found.push_back({"avx512", &rans::decode_avx512, &multiply_avx512, &rotate_avx512, &bfloat16_avx512,
                         &float16_avx512});
    if (isa::avx2())
        found.push_back({"avx2", &rans::decode_avx2, &multiply_avx2, &rotate_avx2, &bfloat16_avx2, &float16_avx2});
#endif
    found.push_back({"generic", &rans::decode_generic, &multiply_generic, &rotate_generic, &bfloat16_generic,
                     &float16_generic});
    return found;
}

inline const Version &version_named(const std::string &isa) {
    static const auto found = versions();
    for (const Version &version : found)
        if (isa.empty() || isa == version.name) return version;
    throw std::invalid_argument("isa: this machine cannot run '" + isa + "'");
}

inline void check(bool ok, const char *message) {
    if (!ok) throw std::invalid_argument(message);
}

}  // namespace restore
