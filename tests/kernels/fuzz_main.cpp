// The program of the build with sanitizers: one of the two fuzzers.
//
//   fuzz kernels|calls SEED CASES
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

void fuzz_kernels(uint64_t seed, int64_t cases);
void fuzz_calls(uint64_t seed, int64_t cases);

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  std::string name = argv[1];
  uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  int64_t cases = std::strtoll(argv[3], nullptr, 10);
  if (name == "kernels")
    fuzz_kernels(seed, cases);
  else if (name == "calls")
    fuzz_calls(seed, cases);
  else
    return 2;
  std::fflush(stdout);
  _exit(0);  // the library's threads sleep for as long as the process lives
}
