//! Takes the timestamps out of a SYN of the local stack, so that a connection to an endpoint has
//! none, like the client's.

use bytemuck::{Pod, Zeroable};

use crate::packet::checksum::Difference;
use crate::packet::headers::{Tcp, tcp_flags};
use crate::packet::options::{TimestampsOption, kind};

/// The first options of a SYN that offers timestamps, as Linux writes them (tcp_options_write):
/// the MSS, then SACK permitted or two NOPs, then the timestamps. Wire order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct SynOptions {
    /// `MSS 4`, and the MSS.
    pub mss: u32,
    /// Two NOPs or `SACK_PERMITTED 2`, and `TIMESTAMPS 10`. Then TSval and TSecr.
    pub timestamps: [u32; TimestampsOption::LEN / 4],
}

impl SynOptions {
    /// Bytes of these options: 16.
    pub const LEN: usize = size_of::<Self>();

    /// The words that replace [`Self::timestamps`], and the change of the checksum. SACK permitted
    /// stays. `None`: the options stand in another layout, and the SYN has to stay as it is.
    #[inline(always)]
    pub fn without_timestamps(&self) -> Option<([u32; TimestampsOption::LEN / 4], Difference)> {
        const MSS_HEAD: [u8; 2] = [kind::MSS, 4];
        const SACK_PERMITTED: [u8; 2] = [kind::SACK_PERMITTED, 2];
        const TIMESTAMPS: [u8; 2] = [kind::TIMESTAMPS, 10];
        const NOPS: [u8; 2] = [kind::NOP; 2];
        let [mss_kind, mss_len, ..] = self.mss.to_ne_bytes();
        let [first, second, third, fourth] = self.timestamps[0].to_ne_bytes();
        let before = [first, second];
        if [mss_kind, mss_len] != MSS_HEAD
            || [third, fourth] != TIMESTAMPS
            || before != SACK_PERMITTED && before != NOPS
        {
            return None;
        }
        let all_nops = u32::from_ne_bytes([kind::NOP; 4]);
        let plain = [u32::from_ne_bytes([first, second, kind::NOP, kind::NOP]), all_nops, all_nops];
        let mut change = Difference::default();
        change.replace(self.timestamps[0], plain[0]);
        change.replace(self.timestamps[1], plain[1]);
        change.replace(self.timestamps[2], plain[2]);
        Some((plain, change))
    }
}

/// Whether a segment opens a connection, and its header has room for [`SynOptions`].
#[inline(always)]
pub const fn may_offer_timestamps(tcp: &Tcp) -> bool {
    const OTHERS: u8 = tcp_flags::ACK | tcp_flags::RST | tcp_flags::FIN;
    tcp.flags & (tcp_flags::SYN | OTHERS) == tcp_flags::SYN
        && tcp.header_len() >= (Tcp::LEN + SynOptions::LEN) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(bytes: [u8; SynOptions::LEN]) -> SynOptions {
        bytemuck::pod_read_unaligned(&bytes)
    }

    const LINUX: [u8; 16] = [2, 4, 5, 180, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0];

    /// The sum of the words, as a checksum would be over them alone.
    fn check(bytes: &[u8]) -> u16 {
        let words = bytes.chunks(2).map(|pair| u64::from(u16::from_ne_bytes([pair[0], pair[1]])));
        crate::packet::checksum::finish(words.sum())
    }

    #[test]
    fn timestamps_become_nops_and_sack_permitted_stays() {
        for before in [[4, 2], [1, 1]] {
            let mut bytes = LINUX;
            bytes[4..6].copy_from_slice(&before);
            let (plain, change) = options(bytes).without_timestamps().unwrap();
            let mut expected = [1; 12];
            expected[..2].copy_from_slice(&before);
            assert_eq!(bytemuck::bytes_of(&plain), expected);
            assert_eq!(change.apply(check(&bytes[4..])), check(&expected));
        }
    }

    #[test]
    fn every_other_layout_stays() {
        for (at, byte) in [(0, 3), (1, 3), (4, 1), (5, 1), (4, 8), (6, 1), (7, 8), (6, 3)] {
            let mut bytes = LINUX;
            bytes[at] = byte;
            assert_eq!(options(bytes).without_timestamps(), None, "{bytes:?}");
        }
    }

    #[test]
    fn only_a_syn_with_room_for_the_options_may_offer_timestamps() {
        let tcp = |flags, words: u8| Tcp { flags, offset: words << 4, ..Tcp::zeroed() };
        assert!(may_offer_timestamps(&tcp(tcp_flags::SYN, 9)));
        assert!(may_offer_timestamps(&tcp(tcp_flags::SYN | tcp_flags::ECE | tcp_flags::CWR, 10)));
        assert!(!may_offer_timestamps(&tcp(tcp_flags::SYN, 8)));
        for flags in [0, tcp_flags::ACK, tcp_flags::SYN | tcp_flags::ACK, tcp_flags::SYN | tcp_flags::RST] {
            assert!(!may_offer_timestamps(&tcp(flags, 10)), "{flags:#x}");
        }
    }
}
