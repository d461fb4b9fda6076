// Compiled into every backend that is a file of its own: the way from there into the module.
#include "backend.h"

#include "ggml_workers.h"

#include <ggml-cpu.h>

#define MINERVA_EXPORTED extern "C" __attribute__((visibility("default")))

extern "C" ggml_backend_reg_t ggml_backend_init(void);  // defined by each of ggml's backends

static const minerva_host * host;

MINERVA_EXPORTED const char * minerva_backend_source(void) {
    return ggml_commit();
}

MINERVA_EXPORTED ggml_backend_reg_t minerva_backend_init(const minerva_host * of_module) {
    host = of_module;
    ggml_set_abort_callback(host->on_abort);
    ggml_log_set(host->on_log, nullptr);
    return ggml_backend_init();
}

// The build has a backend call this instead of `ggml_backend_cpu_buffer_type`.
extern "C" ggml_backend_buffer_type_t minerva_cpu_buffer_type(void) {
    return host->cpu_buffer_type();
}

int minerva_start_worker(pthread_t * thread, const pthread_attr_t * attributes, void * (*run)(void *), void * data) {
    return host->start_worker(thread, attributes, run, data);
}

void minerva_while_waiting(void) {
    host->while_waiting();
}

#if defined(MINERVA_CPU)
MINERVA_EXPORTED bool minerva_backend_suits(void) {
#if defined(__AVX512FP16__)  // which ggml's score does not ask for
    return __builtin_cpu_supports("avx512fp16") != 0;
#else
    return true;
#endif
}

MINERVA_EXPORTED bool minerva_backend_has_dot(enum ggml_type type) {
    return ggml_get_type_traits_cpu(type)->vec_dot != nullptr;
}
#endif
