// What the module gives to a backend that is a file of its own (loading.cpp), and what such a file exports (backend.cpp).
#ifndef MINERVA_BACKEND_H
#define MINERVA_BACKEND_H

#include <ggml-backend-impl.h>

#include <pthread.h>

#ifdef __cplusplus
extern "C" {
#endif

// What there is once in a process. Two copies of ggml-base would each have their own.
typedef struct {
    ggml_abort_callback_t on_abort;
    ggml_log_callback on_log;
    ggml_backend_buffer_type_t (*cpu_buffer_type)(void);
    int (*start_worker)(pthread_t * thread, const pthread_attr_t * attributes, void * (*run)(void *), void * data);
    void (*while_waiting)(void);
} minerva_host;

// The commit of llama.cpp that a file was built from: these structures and ggml's are those of its headers.
typedef const char * (*minerva_backend_source_t)(void);

// Returns NULL if there is nothing to compute on.
typedef ggml_backend_reg_t (*minerva_backend_init_t)(const minerva_host * host);

// Of a backend for the CPU alone: whether the CPU has what the build added to ggml's variant, and whether a type can be
// multiplied.
typedef bool (*minerva_backend_suits_t)(void);
typedef bool (*minerva_backend_has_dot_t)(enum ggml_type type);

#ifdef __cplusplus
}
#endif

#endif
