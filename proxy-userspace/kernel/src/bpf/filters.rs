//! Filters of the qdisc clsact that run a BPF program, where there are no tcx links (before Linux
//! 6.6).
//!
//! The kernel leaves a filter where it is when the process that made it has died. So the name of
//! each filter tells which process made the filter ([`Mark`]), and for which instance, if the
//! instance has pins. By the name, the next process of the instance finds its filters, and other
//! processes find filters that nobody looks after any more.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use aya::programs::TcAttachType;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use proxy_common::instance::Instance;

/// Sizes of `struct nlmsghdr`, `struct tcmsg` and `struct nlattr`
/// (include/uapi/linux/{netlink,rtnetlink}.h).
const HEADER: usize = 16;
const TCMSG: usize = 20;
const IFINFOMSG: usize = 16;
const ATTRIBUTE: usize = 4;

/// include/uapi/linux/pkt_sched.h, pkt_cls.h.
const CLSACT: u32 = 0xffff_0000;
const CLSACT_PARENT: u32 = 0xffff_fff1;
const MIN_INGRESS: u32 = 0xfff2;
const MIN_EGRESS: u32 = 0xfff3;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;

/// The most bytes that one answer has. The kernel cuts a dump into messages that fit.
const BUFFER_BYTES: usize = 64 << 10;

/// Tells, in the network namespace of some filters, that the process that made them lives: an
/// abstract socket. The kernel closes the socket when the process ends.
#[derive(Debug)]
pub(crate) struct Mark {
    token: u64,
    instance: Option<Instance>,
    _socket: UnixDatagram,
}

impl Mark {
    /// A new mark in the caller's network namespace. Pass the `instance` if the filters can outlive
    /// the process.
    pub(crate) fn new(instance: Option<Instance>) -> io::Result<Self> {
        let token = rand::random();
        Ok(Self { token, instance, _socket: UnixDatagram::bind_addr(&address(token)?)? })
    }

    /// The name of a filter with this program.
    fn name(&self, program: &str, made_qdisc: bool) -> String {
        let Self { token, instance, .. } = self;
        Name { program, token: *token, instance: instance.clone(), made_qdisc }.to_string()
    }
}

fn address(token: u64) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("steer-filters-{token:016x}"))
}

/// Whether the process with this mark lives.
fn lives(token: u64) -> io::Result<bool> {
    match UnixDatagram::unbound()?.connect_addr(&address(token)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
        connected => connected.map(|()| true),
    }
}

/// The name of a filter, as `packet_ingress/TOKEN` or `packet_ingress/TOKEN/INSTANCE`; with a `+`
/// appended if the qdisc was made for the filter.
#[derive(Debug, PartialEq, Eq)]
struct Name<'n> {
    program: &'n str,
    /// The token of the process's mark.
    token: u64,
    instance: Option<Instance>,
    made_qdisc: bool,
}

impl<'n> Name<'n> {
    /// `None`: the filter is not one of Steer's.
    fn parse(name: &'n str) -> Option<Self> {
        let (name, made_qdisc) = name.strip_suffix('+').map_or((name, false), |name| (name, true));
        let (program, rest) = name.split_once('/')?;
        let (token, instance) = match rest.split_once('/') {
            Some((token, instance)) => (token, Some(instance.parse().ok()?)),
            None => (rest, None),
        };
        let token = u64::from_str_radix(token, 16).ok().filter(|_| token.len() == 16)?;
        Some(Self { program, token, instance, made_qdisc })
    }
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:016x}", self.program, self.token)?;
        if let Some(instance) = &self.instance {
            write!(f, "/{instance}")?;
        }
        f.write_str(if self.made_qdisc { "+" } else { "" })
    }
}

/// A filter that is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Filter {
    ifindex: u32,
    /// Ingress or egress, as the kernel has it.
    parent: u32,
    handle: u32,
    /// Priority and protocol.
    info: u32,
    name: String,
}

impl Filter {
    /// Attaches a program of this name to an interface, before all others. Makes the qdisc if there
    /// is none.
    ///
    /// # Errors
    /// The interface is gone, or CAP_NET_ADMIN is missing.
    pub(crate) fn attach(
        ifindex: u32,
        direction: TcAttachType,
        (name, program): (&str, BorrowedFd<'_>),
        mark: &Mark,
        made_qdisc: bool,
    ) -> io::Result<Self> {
        // Without a priority, the kernel chooses one before those that are there. Of all protocols.
        let info = u32::from((libc::ETH_P_ALL as u16).to_be());
        let at = (ifindex, 0, parent_of(direction), info);
        Self::set(at, libc::NLM_F_CREATE | libc::NLM_F_EXCL, program, &mark.name(name, made_qdisc))
    }

    /// Gives the filter another program and mark. The kernel puts the new filter at the place of
    /// the old one in its list, so each packet meets exactly one of the two.
    ///
    /// # Errors
    /// The filter is gone, or CAP_NET_ADMIN is missing.
    pub(crate) fn replace(&self, (name, program): (&str, BorrowedFd<'_>), mark: &Mark) -> io::Result<Self> {
        let Self { ifindex, parent, handle, info, .. } = *self;
        let name = mark.name(name, self.made_qdisc());
        Self::set((ifindex, handle, parent, info), libc::NLM_F_REPLACE, program, &name)
    }

    fn set(
        at: (u32, u32, u32, u32),
        flags: libc::c_int,
        program: BorrowedFd<'_>,
        name: &str,
    ) -> io::Result<Self> {
        let mut request = Request::new(libc::RTM_NEWTFILTER, flags | libc::NLM_F_ECHO, at);
        request.text(libc::TCA_KIND, "bpf");
        let options = request.begin(libc::TCA_OPTIONS);
        request.number(TCA_BPF_FD, program.as_raw_fd() as u32);
        request.text(TCA_BPF_NAME, name);
        request.number(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT);
        request.end(options);
        let attached = request.send()?.iter().find_map(|message| read(message));
        attached.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Whether the filter is still attached, with the same mark.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(crate) fn is_there(&self) -> io::Result<bool> {
        all(self.ifindex).map(|filters| filters.contains(self))
    }

    fn made_qdisc(&self) -> bool {
        self.name.ends_with('+')
    }

    /// Detaches the program. Removes the qdisc too, if the qdisc was made for the program and
    /// nobody else uses it.
    ///
    /// # Errors
    /// It is gone already, or CAP_NET_ADMIN is missing.
    pub(crate) fn detach(&self) -> io::Result<()> {
        let Self { ifindex, parent, handle, info, .. } = *self;
        Request::new(libc::RTM_DELTFILTER, 0, (ifindex, handle, parent, info)).send()?;
        if self.made_qdisc() && !has_any(ifindex)? {
            Request::new(libc::RTM_DELQDISC, 0, (ifindex, CLSACT, CLSACT_PARENT, 0)).send()?;
        }
        Ok(())
    }
}

/// Makes the qdisc of an interface, unless the interface has one; returns whether it was made.
///
/// # Errors
/// The interface is gone, or CAP_NET_ADMIN is missing.
pub(crate) fn make_qdisc(ifindex: u32) -> io::Result<bool> {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let mut request = Request::new(libc::RTM_NEWQDISC, flags, (ifindex, CLSACT, CLSACT_PARENT, 0));
    request.text(libc::TCA_KIND, "clsact");
    match request.send() {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        made => made.map(|_| true),
    }
}

/// The filters in the caller's network namespace that run one of these programs and whose process
/// has died; without those that are kept, which `is_kept` tells by instance and interface.
///
/// # Errors
/// The kernel does not tell.
pub(crate) fn orphans(
    programs: &[&str],
    is_kept: impl Fn(Option<&Instance>, u32) -> bool,
) -> io::Result<Vec<Filter>> {
    let mut found = Vec::new();
    for ifindex in interfaces()? {
        let filters = match all(ifindex) {
            // The interface has gone since it was listed, or the kernel has no filters at all.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EOPNOTSUPP)) => continue,
            filters => filters?,
        };
        for filter in filters {
            if let Some(Name { program, token, instance, .. }) = Name::parse(&filter.name)
                && programs.contains(&program)
                && !lives(token)?
                && !is_kept(instance.as_ref(), ifindex)
            {
                found.push(filter);
            }
        }
    }
    Ok(found)
}

/// The filters of an instance with this program on an interface of the caller's network namespace.
///
/// # Errors
/// The interface is gone, or the kernel does not tell.
pub(crate) fn of_instance(instance: &Instance, ifindex: u32, program: &str) -> io::Result<Vec<Filter>> {
    let is_its = |filter: &Filter| {
        Name::parse(&filter.name)
            .is_some_and(|name| name.program == program && name.instance.as_ref() == Some(instance))
    };
    all(ifindex).map(|filters| filters.into_iter().filter(is_its).collect())
}

/// How many interfaces have the filters.
pub(crate) fn count_interfaces(filters: &[Filter]) -> usize {
    let mut interfaces: Vec<_> = filters.iter().map(|filter| filter.ifindex).collect();
    interfaces.sort_unstable();
    interfaces.dedup();
    interfaces.len()
}

fn parent_of(direction: TcAttachType) -> u32 {
    CLSACT | if matches!(direction, TcAttachType::Ingress) { MIN_INGRESS } else { MIN_EGRESS }
}

/// The BPF filters of an interface, in both directions.
fn all(ifindex: u32) -> io::Result<Vec<Filter>> {
    Ok(dump(ifindex)?.iter().filter_map(|message| read(message)).collect())
}

/// Whether an interface has a filter of any kind on its clsact.
fn has_any(ifindex: u32) -> io::Result<bool> {
    dump(ifindex).map(|filters| !filters.is_empty())
}

fn dump(ifindex: u32) -> io::Result<Vec<Vec<u8>>> {
    let mut messages = Vec::new();
    for minor in [MIN_INGRESS, MIN_EGRESS] {
        let request = Request::new(libc::RTM_GETTFILTER, libc::NLM_F_DUMP, (ifindex, 0, CLSACT | minor, 0));
        messages.extend(request.send()?.into_iter().filter(|message| kind(message) == libc::RTM_NEWTFILTER));
    }
    Ok(messages)
}

/// All interfaces of the caller's network namespace.
fn interfaces() -> io::Result<Vec<u32>> {
    // `struct ifinfomsg` is shorter than `struct tcmsg`, and has the index at the same place.
    let mut request = Request::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, (0, 0, 0, 0));
    request.0.truncate(HEADER + IFINFOMSG);
    let links = request.send()?;
    let links = links.iter().filter(|message| kind(message) == libc::RTM_NEWLINK);
    Ok(links.filter_map(|message| number(message, HEADER + 4)).collect())
}

/// A message about a filter, if the filter runs a BPF program.
fn read(message: &[u8]) -> Option<Filter> {
    if kind(message) != libc::RTM_NEWTFILTER {
        return None;
    }
    let at = |offset| number(message, HEADER + offset);
    let options = attribute(message.get(HEADER + TCMSG..)?, libc::TCA_OPTIONS)?;
    let name = attribute(options, TCA_BPF_NAME)?;
    let name = std::str::from_utf8(name).ok()?.trim_end_matches('\0').to_owned();
    Some(Filter { ifindex: at(4)?, handle: at(8)?, parent: at(12)?, info: at(16)?, name })
}

fn kind(message: &[u8]) -> u16 {
    message.get(4..6).map_or(0, |kind| u16::from_ne_bytes([kind[0], kind[1]]))
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The content of an attribute, among others.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let len = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & libc::NLA_TYPE_MASK as u16;
        let content = bytes.get(ATTRIBUTE..len)?;
        if kind == wanted {
            return Some(content);
        }
        bytes = bytes.get(len.next_multiple_of(4)..)?;
    }
}

/// A message to the kernel about filters and their qdisc.
struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, flags: libc::c_int, (ifindex, handle, parent, info): (u32, u32, u32, u32)) -> Self {
        let mut bytes = vec![0; HEADER + TCMSG];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        let flags = (flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        for (at, value) in [(4, ifindex), (8, handle), (12, parent), (16, info)] {
            bytes[HEADER + at..][..4].copy_from_slice(&value.to_ne_bytes());
        }
        Self(bytes)
    }

    /// Begins an attribute. Whatever is added before [`end`](Self::end) is part of the attribute.
    fn begin(&mut self, kind: u16) -> usize {
        let at = self.0.len();
        self.0.extend([0, 0]);
        self.0.extend(kind.to_ne_bytes());
        at
    }

    fn end(&mut self, at: usize) {
        let len = (self.0.len() - at) as u16;
        self.0[at..][..2].copy_from_slice(&len.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn number(&mut self, kind: u16, value: u32) {
        let at = self.begin(kind);
        self.0.extend(value.to_ne_bytes());
        self.end(at);
    }

    fn text(&mut self, kind: u16, value: &str) {
        let at = self.begin(kind);
        self.0.extend(value.bytes());
        self.0.push(0);
        self.end(at);
    }

    /// Sends the message, and returns the kernel's answers up to the end of the dump.
    fn send(mut self) -> io::Result<Vec<Vec<u8>>> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        let socket = Socket::new(NETLINK_ROUTE)?;
        socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
        socket.send(&self.0, 0)?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut answers = Vec::new();
        loop {
            let len = socket.recv(&mut &mut buffer[..], 0)?;
            let mut rest = &buffer[..len];
            while let Some(len) = number(rest, 0).map(|len| len as usize).filter(|len| *len >= HEADER) {
                let message = rest.get(..len).ok_or(io::ErrorKind::InvalidData)?;
                match libc::c_int::from(kind(message)) {
                    libc::NLMSG_DONE => return Ok(answers),
                    libc::NLMSG_ERROR => {
                        let error = number(message, HEADER).ok_or(io::ErrorKind::InvalidData)?.cast_signed();
                        return if error == 0 {
                            Ok(answers)
                        } else {
                            Err(io::Error::from_raw_os_error(-error))
                        };
                    }
                    _ => answers.push(message.to_vec()),
                }
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_who_made_a_filter() {
        for instance in [None, Some("edge-1".parse().unwrap())] {
            let mark = Mark::new(instance.clone()).unwrap();
            for made_qdisc in [false, true] {
                let name = mark.name("packet_ingress", made_qdisc);
                let instance = instance.clone();
                let expected = Name { program: "packet_ingress", token: mark.token, instance, made_qdisc };
                assert_eq!(Name::parse(&name), Some(expected), "{name}");
            }
        }
        let token = "0123456789abcdef";
        for other in ["packet_ingress", "packet_ingress/12", "packet_ingress/", "", &format!("a/{token}/b c")]
        {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_mark_lives_as_long_as_its_socket() {
        let mark = Mark::new(None).unwrap();
        let token = mark.token;
        assert!(lives(token).unwrap());
        drop(mark);
        assert!(!lives(token).unwrap());
    }

    #[test]
    fn attributes_are_found_after_others_and_bad_ones_end_the_search() {
        let mut request = Request::new(0, 0, (0, 0, 0, 0));
        request.text(7, "abcd");
        request.number(8, 5);
        let attributes = &request.0[HEADER + TCMSG..];
        assert_eq!(attribute(attributes, 7), Some(&b"abcd\0"[..]));
        assert_eq!(attribute(attributes, 8), Some(&5_u32.to_ne_bytes()[..]));
        assert_eq!(attribute(attributes, 9), None);
        assert_eq!(attribute(&[0; 8], 9), None);
        assert_eq!(attribute(&attributes[..3], 7), None);
    }
}
