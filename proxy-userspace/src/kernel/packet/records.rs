//! The array `STEER_CONNS` mapped into memory.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::ptr::{self, NonNull};

use proxy_common::flow::Conn;

/// A record in words of the size that its counters have.
pub(super) type Words = [u64; size_of::<Conn>() / size_of::<u64>()];

/// All records. BPF programs and other processes read and write the same memory at the same time, so nothing makes a
/// reference into it, except to atomics.
#[derive(Debug)]
pub(super) struct Records {
    memory: NonNull<Conn>,
    count: u32,
}

// SAFETY: the memory belongs to the mapping, not to a thread, and is accessed as atomics or volatile.
unsafe impl Send for Records {}
// SAFETY: as above.
unsafe impl Sync for Records {}

impl Records {
    /// Maps `map`, which must have been made with BPF_F_MMAPABLE (Linux 5.5) for `count` records, with PROT_READ and
    /// PROT_WRITE as `protection` says.
    pub(super) fn map(map: BorrowedFd<'_>, count: u32, protection: libc::c_int) -> io::Result<Self> {
        let (fd, len) = (map.as_raw_fd(), byte_len(count));
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let memory = unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, 0) };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { memory, count })
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Where a record is.
    pub(super) fn at(&self, conn: u32) -> *mut Conn {
        assert!(conn < self.count, "there is no record {conn}");
        self.memory.as_ptr().wrapping_add(conn as usize)
    }

    /// A copy. Each counter is right by itself; together they may be of slightly different moments.
    pub(super) fn snapshot(&self, conn: u32) -> Conn {
        let record: *const u64 = self.at(conn).cast();
        let words: Words = std::array::from_fn(|index| {
            let place = record.wrapping_add(index);
            // SAFETY: inside the record, and aligned, since it is made of such words.
            unsafe { place.read_volatile() }
        });
        bytemuck::cast(words)
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made, with its length; nothing that borrows it outlives `self`.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), byte_len(self.count)) };
    }
}

pub(super) fn byte_len(count: u32) -> usize {
    size_of::<Conn>() * count as usize
}
