// The instruction sets, from the least on, and which of them this processor has. Included by the module alone.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "cpu.h"

namespace {

#if defined(__aarch64__)
#define BYTES
enum Level { PORTABLE = 0, DOTPROD = 1, I8MM = 2, HALVES = 3, LAST = HALVES };
const char* const NAMES[] = {"portable", "dotprod", "i8mm", "bf16"};
const Level BYTE_PRODUCTS = DOTPROD;
#else
enum Level { PORTABLE = 0, AVX2 = 1, AVX512 = 2, VNNI = 3, HALVES = 4, AMX = 5, LAST = AMX };
const char* const NAMES[] = {"portable", "avx2", "avx512", "vnni", "bf16", "amx"};
const Level BYTE_PRODUCTS = VNNI;
#if defined(__x86_64__)
#define BYTES
#endif
#endif
int best = PORTABLE, level = PORTABLE;

const Kernels& kernels() {
#if defined(__x86_64__)
  if (level >= AVX512) return avx512_kernels;
  if (level == AVX2) return avx2_kernels;
#endif
  return portable_kernels;
}

int detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PORTABLE;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq"))
    return AVX2;
  if (!__builtin_cpu_supports("avx512vnni")) return AVX512;
  if (!__builtin_cpu_supports("avx512bf16")) return VNNI;
  unsigned a, b, c, d = 0;
  const unsigned need = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & need) != need || !amx_allowed()) return HALVES;
  return AMX;
#elif defined(__aarch64__) && defined(__linux__)
  if (!(getauxval(AT_HWCAP) & 1ul << 20)) return PORTABLE;  // HWCAP_ASIMDDP
  const unsigned long more = getauxval(AT_HWCAP2);
  if (!(more & 1ul << 13)) return DOTPROD;  // HWCAP2_I8MM
  return more & 1ul << 14 ? HALVES : I8MM;  // HWCAP2_BF16
#elif defined(__aarch64__) && defined(__APPLE__)
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(name, &value, &size, nullptr, 0) && value;
  };
  if (!has("hw.optional.arm.FEAT_DotProd")) return PORTABLE;
  if (!has("hw.optional.arm.FEAT_I8MM")) return DOTPROD;
  return has("hw.optional.arm.FEAT_BF16") ? HALVES : I8MM;
#else
  return PORTABLE;
#endif
}

}  // namespace
