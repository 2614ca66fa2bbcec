//! The ring buffers by which the BPF programs tell userspace what happened.

use std::io;
use std::marker::PhantomData;

use aya::maps::{MapData, RingBuf};
use bytemuck::AnyBitPattern;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A ring of records of one type, `E`.
#[derive(Debug)]
pub struct Events<E> {
    ring: AsyncFd<Ring>,
    _records: PhantomData<fn() -> E>,
}

/// aya's ring is not `Debug`.
struct Ring(RingBuf<MapData>);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RingBuf")
    }
}

impl std::os::fd::AsRawFd for Ring {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

impl<E: AnyBitPattern> Events<E> {
    /// Must be called inside a tokio runtime, which the ring joins.
    pub(crate) fn new(ring: RingBuf<MapData>) -> io::Result<Self> {
        // SAFETY: the ring owns its descriptor, always gives the same one, and closes it when
        // dropped.
        let ring = unsafe { AsyncFd::register_with_interest(Ring(ring), Interest::READABLE) };
        Ok(Self { ring: ring?, _records: PhantomData })
    }

    /// Waits for events and hands over all events that are in the ring.
    pub async fn read(&mut self, mut each: impl FnMut(E)) -> io::Result<()> {
        let mut ready = self.ring.readable_mut().await?;
        while let Some(item) = ready.get_inner_mut().0.next() {
            match bytemuck::try_pod_read_unaligned(&item) {
                Ok(event) => each(event),
                // The object in the binary was built with this code, so the sizes agree.
                Err(_) => tracing::error!(bytes = item.len(), "an event of another size"),
            }
        }
        ready.clear_ready();
        Ok(())
    }
}
