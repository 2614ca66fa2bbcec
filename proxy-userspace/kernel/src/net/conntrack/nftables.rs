//! Which rule of nftables looks at connection tracking. (The rules of `iptables-nft` are rules of
//! nftables.)
//!
//! Only packets of a hand-over pass the hooks of this namespace, from and to sockets of Steer. So
//! the chains on the hook `forward` do not matter. Chains of the type `nat` do not matter, either:
//! they see the first packet of a connection only.
//!
//! Whoever cannot be read exactly counts as looking: see [`looks`] and [`Leads`].

use std::collections::HashSet;
use std::fmt;
use std::io;

use netlink_packet_core::Nla as _;
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, DataAttribute, ExpressionAttribute, Expressions, GenAttribute, GenMessage,
    Hook, HookNumber, Immediate, InetHookNumber, ListAttribute, Lookup, NfTablesMessage, Register,
    RuleAttribute, RuleMessage, VerdictAttribute,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};

use crate::net::netlink::Netlink;

/// A rule, as `nft -a list ruleset` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub family: &'static str,
    pub table: String,
    pub chain: String,
    pub handle: u64,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} handle {}", self.family, self.table, self.chain, self.handle)
    }
}

/// The number of the rule set. Each change of the rules gives another number.
pub(super) fn generation(netlink: &mut Netlink<NetfilterMessage>) -> io::Result<u32> {
    let request = NfTablesMessage::GetGen(GenMessage { attributes: Vec::new() });
    let answer = netlink.ask(message(NetfilterProtoFamily::Unspec, request))?;
    if let NetfilterMessageInner::NfTables(NfTablesMessage::NewGen(answer)) = answer.inner {
        for attribute in answer.attributes {
            if let GenAttribute::Id(id) = attribute {
                return Ok(id);
            }
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

/// Reads the chains, and the rules of those chains that a packet of a hand-over may reach. Returns
/// the first rule that looks at connection tracking.
pub(super) fn first_that_looks(netlink: &mut Netlink<NetfilterMessage>) -> io::Result<Option<Rule>> {
    let request = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
    let answers = netlink.dump(message(NetfilterProtoFamily::Unspec, request))?;
    let chains = answers.iter().map(Chain::read).collect::<io::Result<Vec<_>>>()?;
    walk(&chains, |chain| {
        let attributes =
            vec![RuleAttribute::Table(chain.table.clone()), RuleAttribute::Chain(chain.name.clone())];
        let request = NfTablesMessage::GetRule(RuleMessage { attributes });
        netlink.dump(message(chain.family, request))
    })
}

fn message(family: NetfilterProtoFamily, message: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message)
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Chain {
    family: NetfilterProtoFamily,
    table: String,
    name: String,
    /// Whether packets of a hand-over enter the rule set here.
    is_entry: bool,
}

impl Chain {
    fn read(answer: &NetfilterMessage) -> io::Result<Self> {
        let NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(ChainMessage { attributes })) =
            &answer.inner
        else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let (mut table, mut name, mut hook, mut kind) = (None, None, None, None);
        for attribute in attributes {
            match attribute {
                ChainAttribute::Table(text) => table = Some(text.clone()),
                ChainAttribute::Name(text) => name = Some(text.clone()),
                ChainAttribute::Hook(attributes) => hook = Some(attributes),
                ChainAttribute::Type(text) => kind = Some(text.as_str()),
                _ => {}
            }
        }
        let is_entry = kind != Some("nat") && hook.is_some_and(|hook| !is_forward(hook));
        match (table, name) {
            (Some(table), Some(name)) => Ok(Self { family: answer.header.family, table, name, is_entry }),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn is_of_table_of(&self, other: &Self) -> bool {
        (self.family, &self.table) == (other.family, &other.table)
    }
}

/// The families inet, ip, ip6 and bridge number their hooks alike. (Packets to a container on a
/// bridge of this host pass the hooks of the family bridge, too.) The family netdev has two hooks
/// only, with lower numbers, so its chains always count.
fn is_forward(hook: &[Hook]) -> bool {
    hook.contains(&Hook::Number(HookNumber::Inet(InetHookNumber::Forward)))
}

/// The first rule that looks, in the chains that can be reached from an entry. `rules_of` reads the
/// rules of a chain.
fn walk(
    chains: &[Chain],
    mut rules_of: impl FnMut(&Chain) -> io::Result<Vec<NetfilterMessage>>,
) -> io::Result<Option<Rule>> {
    let mut to_read: Vec<_> = chains.iter().filter(|chain| chain.is_entry).collect();
    let mut reached = HashSet::new();
    while let Some(chain) = to_read.pop() {
        if !reached.insert((u8::from(chain.family), &chain.table, &chain.name)) {
            continue;
        }
        for answer in rules_of(chain)? {
            let NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(rule)) = &answer.inner else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            let expressions = expressions(rule);
            if expressions.iter().any(|expression| looks(expression)) {
                return Ok(Some(Rule {
                    family: family_name(chain.family),
                    table: chain.table.clone(),
                    chain: chain.name.clone(),
                    handle: handle(rule),
                }));
            }
            for leads in expressions.iter().filter_map(|expression| Leads::of(expression)) {
                to_read.extend(chains.iter().filter(|other| {
                    other.is_of_table_of(chain)
                        && match leads {
                            Leads::To(name) => other.name == name,
                            Leads::Anywhere => true,
                        }
                }));
            }
        }
    }
    Ok(None)
}

fn handle(rule: &RuleMessage) -> u64 {
    let handle = |attribute: &RuleAttribute| match attribute {
        RuleAttribute::Handle(handle) => Some(*handle),
        _ => None,
    };
    rule.attributes.iter().find_map(handle).unwrap_or(0)
}

fn expressions(rule: &RuleMessage) -> Vec<&Expressions> {
    let mut expressions = Vec::new();
    for attribute in &rule.attributes {
        let RuleAttribute::Expressions(list) = attribute else { continue };
        for element in list {
            let ListAttribute::Element(attributes) = element else { continue };
            for attribute in attributes {
                if let ExpressionAttribute::Data(data) = attribute {
                    expressions.push(data);
                }
            }
        }
    }
    expressions
}

/// Matches and targets of xtables that look at the entry of a packet, or restore its mark.
const XT: [&str; 10] = [
    "conntrack",
    "state",
    "connmark",
    "connbytes",
    "connlimit",
    "connlabel",
    "helper",
    "cluster",
    "CONNMARK",
    "CONNSECMARK",
];
/// `NFTA_CT_DREG`: where to put what was read. An expression without it writes (`ct mark set`).
const CT_DREG: u16 = 1;
/// `NFTA_MATCH_NAME` and `NFTA_TARGET_NAME`.
const XT_NAME: u16 = 1;

/// Whether the expression does something else with an invalid packet than with another one. An
/// invalid packet has no entry, so each read of a field of the entry counts, not only `ct state`.
fn looks(expression: &Expressions) -> bool {
    let Expressions::Other { expression_type, attributes } = expression else { return false };
    let value = |kind: u16| {
        attributes.iter().find(|attribute| attribute.kind() == kind).map(|attribute| {
            let mut value = vec![0; attribute.value_len()];
            attribute.emit_value(&mut value);
            value
        })
    };
    match expression_type.as_str() {
        "ct" => value(CT_DREG).is_some(),
        "connlimit" | "synproxy" => true,
        // A rule may add elements to a set, with a limit for each element.
        "dynset" => attributes.iter().any(|attribute| {
            let mut value = vec![0; attribute.value_len()];
            attribute.emit_value(&mut value);
            let name = b"connlimit";
            value.windows(name.len()).any(|window| window == name)
        }),
        "match" | "target" => value(XT_NAME).is_none_or(|name| {
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            XT.iter().any(|looking| looking.as_bytes() == name)
        }),
        _ => false,
    }
}

/// Where a rule leads a packet.
#[derive(Debug, PartialEq, Eq)]
enum Leads<'e> {
    /// By `jump` or `goto`.
    To(&'e str),
    /// By a verdict map, whose elements are not read: to any chain of the table.
    Anywhere,
}

impl<'e> Leads<'e> {
    fn of(expression: &'e Expressions) -> Option<Self> {
        match expression {
            Expressions::Immediate(attributes) => attributes.iter().find_map(|attribute| {
                let Immediate::Data(DataAttribute::Verdict(verdict)) = attribute else { return None };
                verdict.iter().find_map(|attribute| match attribute {
                    VerdictAttribute::Chain(name) => Some(Self::To(name)),
                    _ => None,
                })
            }),
            Expressions::Lookup(attributes) => attributes
                .iter()
                .any(|attribute| matches!(attribute, Lookup::DestinationRegister(Register::Verdict)))
                .then_some(Self::Anywhere),
            _ => None,
        }
    }
}

/// As `nft` writes it.
fn family_name(family: NetfilterProtoFamily) -> &'static str {
    match family {
        NetfilterProtoFamily::Inet => "inet",
        NetfilterProtoFamily::IPv4 => "ip",
        NetfilterProtoFamily::IPv6 => "ip6",
        NetfilterProtoFamily::Bridge => "bridge",
        NetfilterProtoFamily::NetDev => "netdev",
        NetfilterProtoFamily::ARP => "arp",
        _ => "unknown",
    }
}
