// What GCC 9 to 12 take from the system's libraries, and manylinux_2_28 (glibc 2.28, GLIBCXX_3.4.24) does not have.
// With definitions of its own a library loads there, too. They are weak, as PyTorch's containers link the like.
#include <memory>
#include <new>
#include <sstream>

#if defined(__GLIBCXX__) && _GLIBCXX_RELEASE >= 9

// std::shared_ptr of GCC 11 asks glibc 2.32 whether it may count without atomics. 0, "there may be threads", is always
// right. Visible, so that a glibc that has it goes before.
extern "C" {
__attribute__((weak, visibility("default"))) char __libc_single_threaded = 0;
}

namespace std {

// GCC 11 (GLIBCXX_3.4.29): an allocation of more bytes than size_t can say.
__attribute__((weak)) void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// GCC 9 (GLIBCXX_3.4.26): constructors without arguments.
template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();

}  // namespace std

#endif
