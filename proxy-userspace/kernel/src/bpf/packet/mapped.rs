//! The array `STEER_CONNS` mapped into memory.

use std::io;
use std::os::fd::BorrowedFd;

use memmap2::{MmapOptions, MmapRaw};
use proxy_common::flow::Record;

/// A record in words of the size that its counters have.
pub(super) type Words = [u64; size_of::<Record>() / size_of::<u64>()];

/// All records, of this build or another. BPF programs and other processes read and write the same
/// memory at the same time. So nothing makes a reference into the memory, except to atomics.
#[derive(Debug)]
pub(super) struct MappedRecords {
    memory: MmapRaw,
    /// Words of one record.
    words: usize,
    count: u32,
}

impl MappedRecords {
    /// Maps `map` for reading and writing. It must have been made with BPF_F_MMAPABLE (Linux 5.5),
    /// for `count` records.
    pub(super) fn map(map: BorrowedFd<'_>, count: u32) -> io::Result<Self> {
        let words = words(size_of::<Record>() as u32);
        let memory = MmapOptions::new().len(byte_len(words, count)).map_raw(&map)?;
        Ok(Self { memory, words, count })
    }

    /// Maps `map` for reading only. Its records have `size` bytes, and each begins at a multiple of
    /// 8.
    pub(super) fn map_read_only(map: BorrowedFd<'_>, size: u32, count: u32) -> io::Result<Self> {
        let words = words(size);
        let memory = MmapOptions::new().len(byte_len(words, count)).map_raw_read_only(&map)?;
        Ok(Self { memory, words, count })
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// The address of a record.
    pub(super) fn at(&self, index: u32) -> *mut u64 {
        assert!(index < self.count, "there is no record {index}");
        self.memory.as_mut_ptr().cast::<u64>().wrapping_add(index as usize * self.words)
    }

    /// Copies the first words of a record, as many as fit. Each counter is right by itself, but two
    /// counters may be from slightly different moments.
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
}

/// How many words a record of `size` bytes takes.
fn words(size: u32) -> usize {
    (size as usize).div_ceil(size_of::<u64>())
}

fn byte_len(words: usize, count: u32) -> usize {
    words * size_of::<u64>() * count as usize
}
