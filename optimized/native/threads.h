// Threads for one call of an operator. Results never depend on how many there are.

#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace native {

// Runs body(thread) for 0 <= thread < threads, all at once; the caller's thread is number 0.
template <class Body>
void on_threads(int threads, Body body) {
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
    body(0);
    for (std::thread& other : others) other.join();
}

// Holds threads back until all of them have arrived.
class Barrier {
public:
    explicit Barrier(int threads) : threads(threads), missing(threads) {}

    void wait() {
        if (threads == 1) return;
        std::unique_lock<std::mutex> lock(mutex);
        uint64_t mine = round;
        if (--missing == 0) {
            missing = threads;
            ++round;
            all_here.notify_all();
        } else {
            all_here.wait(lock, [&] { return round != mine; });
        }
    }

private:
    std::mutex mutex;
    std::condition_variable all_here;
    int threads, missing;
    uint64_t round = 0;
};

// Lets threads through one after another, in the order of their tickets 0, 1, 2, ...
class Turnstile {
public:
    void wait(int64_t ticket) {
        std::unique_lock<std::mutex> lock(mutex);
        moved.wait(lock, [&] { return next == ticket; });
    }
    void pass() {
        std::lock_guard<std::mutex> lock(mutex);
        ++next;
        moved.notify_all();
    }

private:
    std::mutex mutex;
    std::condition_variable moved;
    int64_t next = 0;
};

}  // namespace native
