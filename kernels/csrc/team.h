// Threads that work through a kernel together, on machines that others use too.
//
// A decode step has dozens of barriers, and a training step some a layer. A thread that waits looks for a while whether
// it may go on and then sleeps until it is woken (futex). Where it had to sleep it looks a quarter as long the next
// time, and twice as long where looking was enough: on an idle machine nobody sleeps, and where another process has
// one of the cores, nobody burns the time slices that the thread waited for needs, as OpenMP's threads do.

#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels.h"

namespace {

constexpr int FEWEST_SPINS = 600;  // of 20 to 60 ns each: about what sleeping and waking cost
constexpr int MOST_SPINS = 40000;

class Signal {  // a number that threads wait for to change
    std::atomic<uint32_t> number{0}, sleepers{0};
    static_assert(sizeof(number) == sizeof(uint32_t), "a futex is a word");

    void futex(int operation, uint32_t value) {
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&number), operation, value, nullptr, nullptr, 0);
    }

   public:
    uint32_t now() const { return number.load(std::memory_order_acquire); }

    void change() {
        number.fetch_add(1);
        if (sleepers.load()) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
    }

    // `spins`: how often to look at most, kept by the thread for its next wait of this kind.
    void wait_while(uint32_t value, int& spins) {
        for (int i = 0; i < spins; i++, _mm_pause())
            if (now() != value) {
                spins = std::min(MOST_SPINS, spins * 2);
                return;
            }
        spins = std::max(FEWEST_SPINS, spins / 4);
        sleepers.fetch_add(1);  // before the number is read again, so that `change` cannot miss it
        while (number.load() == value) futex(FUTEX_WAIT_PRIVATE, value);
        sleepers.fetch_sub(1);
    }
};

// The threads of one library. They are started when first needed, sleep between calls, and end with the process.
class Team {
    struct Worker {
        alignas(64) Signal called;
    };

    static inline std::atomic<Team*> current{nullptr};

    const pid_t owner = getpid();
    std::mutex one_at_a_time;
    std::vector<std::unique_ptr<Worker>> workers;
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) Signal all_arrived;
    void (*function)(const void*, int, int) = nullptr;  // of the call at hand, as are the next two
    const void* context = nullptr;
    int size = 1;

    // Whether this thread is the last one of `all`: read before, since with the last one the next call may begin
    bool arrive(int all) {
        if (arrived.fetch_add(1) + 1 < all) return false;
        arrived.store(0);
        all_arrived.change();
        return true;
    }

    void serve(Worker& worker, int thread) {
        int spins = MOST_SPINS;
        for (uint32_t seen = 0;; seen++) {
            worker.called.wait_while(seen, spins);
            const int all = size;
            function(context, thread, all);
            arrive(all);
        }
    }

    void start_worker() {
        workers.push_back(std::make_unique<Worker>());
        sigset_t all, before;  // signals are for the threads of Python
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        std::thread(&Team::serve, this, std::ref(*workers.back()), static_cast<int>(workers.size())).detach();
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

   public:
    static Team& get() {  // never freed: its threads may outlive static objects. A forked process has none of them
        Team* found = current.load();
        if (found && found->owner == getpid()) return *found;
        Team* made = new Team;
        if (current.compare_exchange_strong(found, made)) return *made;
        delete made;
        return *found;
    }

    static void barrier_of_call() { current.load()->barrier(); }

    void barrier() {
        const uint32_t seen = all_arrived.now();
        static thread_local int spins = MOST_SPINS;
        if (!arrive(size)) all_arrived.wait_while(seen, spins);
    }

    // work(thread, threads) on as many threads, this one among them
    template <typename Work>
    void run(int threads, const Work& work) {
        const std::lock_guard<std::mutex> lock(one_at_a_time);
        while (static_cast<int>(workers.size()) < threads - 1) start_worker();
        function = [](const void* self, int thread, int all) { (*static_cast<const Work*>(self))(thread, all); };
        context = &work;
        size = threads;
        for (int i = 0; i + 1 < threads; i++) workers[i]->called.change();
        work(0, threads);
        barrier();
    }
};

// work(thread, threads) on `threads` threads; where they have to wait for each other they call `barrier()`
template <typename Work>
void in_parallel(int threads, const Work& work) {
    Team::get().run(threads, work);
}

inline void barrier() { Team::barrier_of_call(); }

// What OpenMP's static schedule gives a thread: the first ones have one more where it does not divide
inline Range equal_share(int64_t total, int64_t thread, int64_t threads) {
    const int64_t each = total / threads, more = total % threads;
    return {thread * each + std::min(thread, more), (thread + 1) * each + std::min(thread + 1, more)};
}

}  // namespace
