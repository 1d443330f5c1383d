// What GCC's headers take from libraries of their own year is here, so that older ones serve, too, down to those that torch
// itself needs: libstdc++ of GCC 8, and glibc 2.28.
#include <new>
#include <sstream>

// glibc 2.32. Whether the process has one thread only, so that shared pointers may count without atomics: never.
extern "C" {
char __libc_single_threaded = 0;
}

namespace std {

void __throw_bad_array_new_length() { throw bad_array_new_length(); }  // GCC 11

// GCC 9 has their default constructors, GCC 11 str() as C++20 declares it.
template class basic_stringbuf<char>;
template class basic_ostringstream<char>;
template class basic_stringstream<char>;

}  // namespace std
