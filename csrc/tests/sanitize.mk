# Compiles sanitize.cpp with the kernels and runs it; from the repository's root, with g++ alone.
# What the processor cannot run is not compiled.

AVX512 := $(shell grep -qsw avx512vl /proc/cpuinfo && echo yes)
NAMES := kernels_base kernels_avx2 $(if $(AVX512),kernels_avx512) parallel tests/sanitize
FLAGS := -std=c++17 -O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined \
  -fno-sanitize-recover=undefined -ffp-contract=fast -fno-math-errno -Wall -Wextra \
  $(if $(AVX512),,-DHEAT_WITHOUT_AVX512)
OBJECTS := $(NAMES:%=build/sanitize/%.o)

.PHONY: run
run: build/sanitize/run
	@$<

build/sanitize/run: $(OBJECTS)
	@g++ -fsanitize=address,undefined $^ -ldl -pthread -o $@

build/sanitize/%.o: csrc/%.cpp $(wildcard csrc/*.h)
	@mkdir -p $(@D)
	@g++ $(FLAGS) -c $< -o $@
