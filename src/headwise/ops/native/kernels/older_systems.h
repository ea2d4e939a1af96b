// Included before all else in what a wheel has, so that it needs of glibc and libstdc++ only what
// older systems have. Templates of the standard library are instantiated here instead of there.
#include <bits/c++config.h>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0

#include <bits/functexcept.h>

#include <cstdlib>

// glibc 2.32 tells shared pointers whether there is one thread: there may be several.
extern "C" [[gnu::visibility("hidden")]] char __libc_single_threaded = 0;

namespace std {
// Of GCC 11: a vector whose size no memory has.
[[gnu::visibility("hidden")]] void __throw_bad_array_new_length() { abort(); }
}  // namespace std
