// A kernel of csrc/ as a function for Python: its arguments, 8 bytes each, and the grid.
#define EMULATED
#include SOURCE

#include <tuple>

// A pointer or a number is one value, a struct several.
template <class T> static T take(const i64*& values) {
  T taken;
  memcpy(&taken, values, sizeof taken);
  values += (sizeof taken + 7) / 8;
  return taken;
}
template <class... Arguments> static void call(void (*kernel)(Arguments...), const i64* values) {
  std::apply(kernel, std::tuple<Arguments...>{take<Arguments>(values)...});
}

extern "C" const char* run(const i64* values, int grid_x, int grid_y) {
  simt::launch(grid_x, grid_y, THREADS, sizeof(Shared), [&] { call(NAME, values); });
  return simt::failure;
}

extern "C" int shared_size() { return sizeof(Shared); }
