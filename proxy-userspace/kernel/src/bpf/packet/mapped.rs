//! The array `STEER_CONNS` mapped into memory.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::ptr::{self, NonNull};

use proxy_common::flow::Record;

/// A record in words of the size that its counters have.
pub(super) type Words = [u64; size_of::<Record>() / size_of::<u64>()];

/// All records, of this build or another. BPF programs and other processes read and write the same memory at the same time, so
/// nothing makes a reference into it, except to atomics.
#[derive(Debug)]
pub(super) struct MappedRecords {
    memory: NonNull<u64>,
    /// Of a record.
    words: usize,
    count: u32,
}

// SAFETY: the memory belongs to the mapping, not to a thread, and is accessed as atomics or volatile.
unsafe impl Send for MappedRecords {}
// SAFETY: as above.
unsafe impl Sync for MappedRecords {}

impl MappedRecords {
    /// Maps `map`, which must have been made with BPF_F_MMAPABLE (Linux 5.5) for `count` records, with PROT_READ and
    /// PROT_WRITE as `protection` says.
    pub(super) fn map(map: BorrowedFd<'_>, count: u32, protection: libc::c_int) -> io::Result<Self> {
        Self::map_sized(map, size_of::<Record>() as u32, count, protection)
    }

    /// The same of records of `size` bytes, each of which begins at a multiple of 8.
    pub(super) fn map_sized(
        map: BorrowedFd<'_>,
        size: u32,
        count: u32,
        protection: libc::c_int,
    ) -> io::Result<Self> {
        let words = (size as usize).div_ceil(size_of::<u64>());
        let (fd, len) = (map.as_raw_fd(), byte_len(words, count));
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let memory = unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, 0) };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { memory, words, count })
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Where a record is.
    pub(super) fn at(&self, index: u32) -> *mut u64 {
        assert!(index < self.count, "there is no record {index}");
        self.memory.as_ptr().wrapping_add(index as usize * self.words)
    }

    /// A copy of the first words of a record, and of all if there is room. Each counter is right by itself; together they may
    /// be of slightly different moments.
    pub(super) fn read(&self, index: u32, words: &mut [u64]) {
        let record = self.at(index);
        for (nth, word) in words.iter_mut().enumerate().take(self.words) {
            let place = record.wrapping_add(nth);
            // SAFETY: inside the record, and aligned, since it is made of such words.
            *word = unsafe { place.read_volatile() };
        }
    }

    /// A copy of a record of this build.
    pub(super) fn snapshot(&self, index: u32) -> Record {
        let mut words: Words = [0; size_of::<Words>() / size_of::<u64>()];
        self.read(index, &mut words);
        bytemuck::cast(words)
    }

    fn byte_len(&self) -> usize {
        byte_len(self.words, self.count)
    }
}

impl Drop for MappedRecords {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map_sized` made, with its length; nothing that borrows it outlives `self`.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.byte_len()) };
    }
}

fn byte_len(words: usize, count: u32) -> usize {
    words * size_of::<u64>() * count as usize
}
