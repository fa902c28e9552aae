#include "cpu/parallel.h"

namespace longctx::cpu {
namespace {

ThreadPool pool = {[] { return int64_t{1}; },
                   [](int64_t n, RangeBody body, void* context) { body(0, n, context); }};

}  // namespace

void set_thread_pool(ThreadPool lent) { pool = lent; }
const ThreadPool& thread_pool() { return pool; }

}  // namespace longctx::cpu
