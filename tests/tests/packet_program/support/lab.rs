//! The programs and their maps in the kernel, attached to no interface. `BPF_PROG_TEST_RUN` runs
//! packets through them.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfLoader};
use proxy_common::abi;
use proxy_common::expiry::Expiry;
use proxy_common::flow::{Direction, FlowEvent, FlowKey4, FlowKey6, FlowRef, Record};
use proxy_common::no_stamps::{LocalEnd, Until};
use proxy_common::packet::headers::Ethernet;
use proxy_common::stat::Stat;
use steer_tests::netns::NetNs;
use steer_tests::require;

use super::session::{Key, Session, wire};

/// The `SO_MARK` of the proxy's sockets in a hand-over. It is not the default, so that the tests
/// see that the programs use the setting.
pub(crate) const MARK: u32 = 0x0c0f_fee0;
/// The mark of copied acknowledgements.
pub(crate) const COPY_MARK: u32 = MARK + 1;
/// The mark of sockets whose SYN is to leave without timestamps.
pub(crate) const SYN_MARK: u32 = MARK + 2;

pub(crate) const RECORDS: u32 = 16;
/// Small, so that a test can fill the ring.
pub(crate) const EVENTS_BYTES: u32 = 4096;

/// The verdicts of the programs (linux/pkt_cls.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// TC_ACT_UNSPEC: the next program or the stack gets the packet.
    Pass,
    /// TC_ACT_OK: the local stack gets the packet, even if there are other programs.
    Accept,
    /// TC_ACT_SHOT.
    Drop,
    /// TC_ACT_REDIRECT.
    Redirect,
}

/// The input of a program.
#[derive(Debug, Clone, Default)]
pub(crate) struct Input {
    pub(crate) frame: Vec<u8>,
    /// skb->mark.
    pub(crate) mark: u32,
    /// skb->ingress_ifindex.
    pub(crate) ingress_ifindex: u32,
    /// If not 0: the packet is a super-packet of segments with this much payload.
    pub(crate) gso_size: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) verdict: Verdict,
    pub(crate) frame: Vec<u8>,
    pub(crate) mark: u32,
    /// The mean time of one run.
    pub(crate) nanoseconds: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hook {
    Ingress,
    Egress,
    /// Not a hook: the program that examines old streams, and starts the timer that repeats this.
    Expire,
}

pub(crate) struct Lab {
    ingress: OwnedFd,
    egress: OwnedFd,
    expire: OwnedFd,
    flows4: HashMap<MapData, FlowKey4, FlowRef>,
    flows6: HashMap<MapData, FlowKey6, FlowRef>,
    records: Array<MapData, [u8; size_of::<Record>()]>,
    stats: PerCpuArray<MapData, u64>,
    events: RingBuf<MapData>,
    expiry: Array<MapData, Expiry>,
    no_stamps: HashMap<MapData, LocalEnd, Until>,
    /// The timer runs as long as this map is open.
    _timer: Map,
}

/// Runs a test in a new network namespace, with newly loaded programs. Prints why if it cannot.
pub(crate) fn in_namespace(test: impl FnOnce(&mut Lab) + Send) {
    in_namespace_with(RECORDS, test);
}

/// The same with `records` records.
pub(crate) fn in_namespace_with(records: u32, test: impl FnOnce(&mut Lab) + Send) {
    if !require::root() {
        return;
    }
    if !object().exists() {
        require::skip("the BPF object is missing: run cargo xtask build-ebpf");
        return;
    }
    let netns = NetNs::new("steer-t", "programs").unwrap();
    netns.run(|| test(&mut Lab::load(records))).unwrap();
}

/// Where `cargo xtask build-ebpf` puts the object.
fn object() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/steer-ebpf.o")
}

impl Lab {
    fn load(records: u32) -> Self {
        let mut ebpf = EbpfLoader::new()
            .override_global(abi::GLOBAL_MARK, &MARK, true)
            .map_max_entries(abi::MAP_CONNS, records)
            .map_max_entries(abi::MAP_FLOW_EVENTS, EVENTS_BYTES)
            .map_max_entries(abi::MAP_FLOWS4, 2 * records)
            .map_max_entries(abi::MAP_FLOWS6, 2 * records)
            .load(&std::fs::read(object()).unwrap())
            .unwrap();
        let ingress = load_program(&mut ebpf, abi::PROG_PACKET_INGRESS);
        let egress = load_program(&mut ebpf, abi::PROG_PACKET_EGRESS);
        let expire = load_program(&mut ebpf, abi::PROG_PACKET_EXPIRE);
        let mut take = |name: &str| ebpf.take_map(name).unwrap();
        Self {
            ingress,
            egress,
            expire,
            flows4: take(abi::MAP_FLOWS4).try_into().unwrap(),
            flows6: take(abi::MAP_FLOWS6).try_into().unwrap(),
            records: take(abi::MAP_CONNS).try_into().unwrap(),
            stats: take(abi::MAP_FLOW_STATS).try_into().unwrap(),
            events: take(abi::MAP_FLOW_EVENTS).try_into().unwrap(),
            expiry: take(abi::MAP_AGEING).try_into().unwrap(),
            no_stamps: take(abi::MAP_NO_STAMPS).try_into().unwrap(),
            _timer: take(abi::MAP_TIMER),
        }
    }

    /// Writes the record and both keys, as the daemon does.
    pub(crate) fn open(&mut self, session: &Session) {
        self.set_record(session.index, &session.record);
        self.point_keys_at(session, session.index);
    }

    /// Writes both keys so that they lead to record `index`.
    pub(crate) fn point_keys_at(&mut self, session: &Session, index: u32) {
        for direction in Direction::BOTH {
            self.insert(session.key(direction), FlowRef::new(index, direction)).unwrap();
        }
    }

    pub(crate) fn insert(&mut self, key: Key, flow: FlowRef) -> Result<(), MapError> {
        match key {
            Key::V4(key) => self.flows4.insert(key, flow, 0),
            Key::V6(key) => self.flows6.insert(key, flow, 0),
        }
    }

    /// Removes all sessions.
    pub(crate) fn clear(&mut self) {
        for key in self.flows4.keys().collect::<Result<Vec<_>, _>>().unwrap() {
            self.flows4.remove(&key).unwrap();
        }
        for key in self.flows6.keys().collect::<Result<Vec<_>, _>>().unwrap() {
            self.flows6.remove(&key).unwrap();
        }
        self.events();
    }

    pub(crate) fn has_key(&self, key: Key) -> bool {
        match key {
            Key::V4(key) => self.flows4.get(&key, 0).is_ok(),
            Key::V6(key) => self.flows6.get(&key, 0).is_ok(),
        }
    }

    pub(crate) fn record(&self, index: u32) -> Record {
        bytemuck::pod_read_unaligned(&self.records.get(&index, 0).unwrap())
    }

    pub(crate) fn set_record(&mut self, index: u32, record: &Record) {
        self.records.set(index, bytemuck::bytes_of(record).first_chunk().unwrap(), 0).unwrap();
    }

    /// All counters, by number.
    pub(crate) fn stats(&self) -> Vec<u64> {
        let count = |stat: &Stat| self.stats.get(&stat.number(), 0).unwrap().iter().sum();
        Stat::ALL.iter().map(count).collect()
    }

    pub(crate) fn set_expiry(&mut self, expiry: Expiry) {
        self.expiry.set(0, expiry, 0).unwrap();
    }

    /// SYNs to `local` lose their timestamps until this time.
    pub(crate) fn take_timestamps(&mut self, local: SocketAddr, until: u64) {
        let kind = if local.is_ipv4() { Ethernet::IPV4 } else { Ethernet::IPV6 };
        let key = LocalEnd { address: wire(local.ip()), port: local.port().to_be(), kind };
        self.no_stamps.insert(key, Until { ns: until }, 0).unwrap();
    }

    /// The events since the last call.
    pub(crate) fn events(&mut self) -> Vec<FlowEvent> {
        let mut events = Vec::new();
        while let Some(event) = self.events.next() {
            events.push(bytemuck::pod_read_unaligned(&event));
        }
        events
    }

    /// Runs a program once.
    pub(crate) fn run(&self, hook: Hook, input: &Input) -> Output {
        self.try_run(hook, input, 1, 0).unwrap()
    }

    /// Runs a program once on a packet that a network card has summed up (CHECKSUM_COMPLETE). The
    /// kernel checks the sum afterwards.
    pub(crate) fn run_summed(&self, hook: Hook, input: &Input) -> io::Result<Output> {
        const BPF_F_TEST_SKB_CHECKSUM_COMPLETE: u32 = 1 << 2;
        self.try_run(hook, input, 1, BPF_F_TEST_SKB_CHECKSUM_COMPLETE)
    }

    /// Runs a program `repeat` times. Each run gets the packet that the run before has left.
    pub(crate) fn try_run(&self, hook: Hook, input: &Input, repeat: u32, flags: u32) -> io::Result<Output> {
        let program = match hook {
            Hook::Ingress => &self.ingress,
            Hook::Egress => &self.egress,
            Hook::Expire => &self.expire,
        };
        let context = SkBuff {
            mark: input.mark,
            ingress_ifindex: input.ingress_ifindex,
            gso_size: input.gso_size,
            gso_segs: (input.frame.len() as u32).checked_div(input.gso_size).map_or(0, |whole| whole + 1),
            ..bytemuck::Zeroable::zeroed()
        };
        let mut left: SkBuff = bytemuck::Zeroable::zeroed();
        // A program may make a packet longer. The programs here do not.
        let mut frame = vec![0; input.frame.len() + 256];
        let mut attributes = TestRun {
            prog_fd: program.as_raw_fd() as u32,
            data_in: input.frame.as_ptr() as u64,
            data_size_in: input.frame.len() as u32,
            data_out: frame.as_mut_ptr() as u64,
            data_size_out: frame.len() as u32,
            ctx_in: (&raw const context) as u64,
            ctx_size_in: size_of::<SkBuff>() as u32,
            ctx_out: (&raw mut left) as u64,
            ctx_size_out: size_of::<SkBuff>() as u32,
            repeat,
            flags,
            ..bytemuck::Zeroable::zeroed()
        };
        const BPF_PROG_TEST_RUN: i32 = 10;
        // SAFETY: every address belongs to a live buffer of the given size, and nobody else uses
        // the output buffers.
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut attributes, size_of::<TestRun>())
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        frame.truncate(attributes.data_size_out as usize);
        let verdict = match attributes.retval {
            u32::MAX => Verdict::Pass,
            0 => Verdict::Accept,
            2 => Verdict::Drop,
            7 => Verdict::Redirect,
            other => panic!("verdict {other}"),
        };
        Ok(Output { verdict, frame, mark: left.mark, nanoseconds: attributes.duration })
    }
}

fn load_program(ebpf: &mut Ebpf, name: &str) -> OwnedFd {
    let program: &mut SchedClassifier = ebpf.program_mut(name).unwrap().try_into().unwrap();
    if let Err(ProgramError::LoadError { verifier_log, .. }) = program.load() {
        // The verifier writes the fault at the end.
        let log = verifier_log.to_string();
        let lines: Vec<&str> = log.lines().collect();
        panic!("the verifier refused {name}:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
    }
    program.fd().unwrap().as_fd().try_clone_to_owned().unwrap()
}

/// The part of union bpf_attr (linux/bpf.h) that BPF_PROG_TEST_RUN reads and writes.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    _pad: u32,
}

/// struct __sk_buff (linux/bpf.h). The kernel demands zero in most fields.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct SkBuff {
    _len_and_type: [u32; 2],
    mark: u32,
    _queue_to_vlan: [u32; 5],
    _priority: u32,
    ingress_ifindex: u32,
    _ifindex_to_gso: [u32; 31],
    gso_segs: u32,
    _socket: [u32; 2],
    gso_size: u32,
    _timestamps: [u32; 3],
}

const _: () = assert!(size_of::<SkBuff>() == 192);
const _: () = assert!(std::mem::offset_of!(SkBuff, gso_segs) == 164);
