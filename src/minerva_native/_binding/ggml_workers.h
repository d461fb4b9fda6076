// Included before ggml's CPU scheduler, by the compiler's -include: its worker threads start, and wait, in failure.cpp.
//
// An exception must not leave a thread, nor leave others waiting for that thread for ever. So a worker is started by a
// function that catches, and every turn of a loop that waits looks whether another thread has failed.
#ifndef MINERVA_GGML_WORKERS_H
#define MINERVA_GGML_WORKERS_H

#include <pthread.h>

#ifdef __cplusplus
extern "C" {
#endif

int minerva_start_worker(pthread_t * thread, const pthread_attr_t * attributes, void * (*run)(void *), void * data);
void minerva_while_waiting(void);

#ifdef __cplusplus
}
#else

#define pthread_create minerva_start_worker

// The scheduler defines this function with (void) and calls it with (): the definition gets another name, and the calls
// look around as well.
#define ggml_thread_cpu_relax(arguments) MINERVA_RELAX_##arguments
#define MINERVA_RELAX_void minerva_relax(void)
#define MINERVA_RELAX_ (minerva_relax(), minerva_while_waiting())

#endif

#endif
