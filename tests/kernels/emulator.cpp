// A kernel of csrc/ as a function for Python: pointers, numbers and the grid.
#define EMULATED
#include SOURCE

extern "C" const char* run(void** p, const i64* n, int grid_x, int grid_y) {
  simt::launch(grid_x, grid_y, THREADS, sizeof(Shared), [&] {
    const IO *r = (IO*)p[0], *log_w = (IO*)p[1], *k = (IO*)p[2], *v = (IO*)p[3], *kappa = (IO*)p[4], *a = (IO*)p[5];
    const float* state = (float*)p[6];
    const int* cu_seqlens = (int*)p[7];
#ifdef FORWARD
    NAME(r, log_w, k, v, kappa, a, state, cu_seqlens, (IO*)p[8], (float*)p[9], (f16*)p[10],
         n[0], n[1], n[2], n[3], n[4]);
#else
    OUT* d[6];
    for (int i = 0; i < 6; i++) d[i] = (OUT*)p[11 + i];
    NAME(r, log_w, k, v, kappa, a, state, cu_seqlens, (f16*)p[8], (IO*)p[9], (float*)p[10],
         d[0], d[1], d[2], d[3], d[4], d[5], (float*)p[17], n[0], n[1], n[2], n[3], n[4]);
#endif
  });
  return simt::failure;
}

extern "C" int shared_size() { return sizeof(Shared); }
