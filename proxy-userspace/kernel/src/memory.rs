//! The allocator, and how it is set.

#[cfg(not(feature = "jemalloc"))]
pub use std::alloc::System as Allocator;

/// Thousands of streams come and go at once. glibc's allocator keeps the memory of ended streams
/// for ever (18 of 25 MiB after 3,000 streams). jemalloc gives the memory back.
#[cfg(feature = "jemalloc")]
pub use tikv_jemallocator::Jemalloc as Allocator;

/// jemalloc's `malloc_conf`: a background thread returns pages that were not used for a second.
#[cfg(feature = "jemalloc")]
// SAFETY: jemalloc declares this name as `const char *` and only reads it.
#[unsafe(export_name = "_rjem_malloc_conf")]
static MALLOC_CONF: MallocConf =
    MallocConf(c"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0".as_ptr());

#[cfg(feature = "jemalloc")]
#[repr(transparent)]
struct MallocConf(*const std::ffi::c_char);

// SAFETY: the pointer is to a constant.
#[cfg(feature = "jemalloc")]
unsafe impl Sync for MallocConf {}
