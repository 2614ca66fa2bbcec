//! How much stack the programs of an object take. The verifier limits the stack of a whole chain of
//! calls. Newer kernels count less than older ones (6.12 rounds frames up to 16 bytes), so an older
//! kernel may refuse a program that loads here.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context as _, Result, bail, ensure};
use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, RelocationFlags, RelocationTarget, SectionIndex,
    SectionKind, SymbolKind,
};

/// The verifier's MAX_BPF_STACK.
const LIMIT: u64 = 512;
/// What the verifier rounds each frame up to; an empty one counts as one byte.
const ROUNDED_TO: u64 = 32;
/// The verifier's MAX_CALL_FRAMES.
const MAX_FRAMES: usize = 8;

/// One instruction.
const SLOT: u64 = 8;
/// Opcodes of the instruction set that say where a frame is touched, and what is called.
const LOAD_64: u8 = 0x18;
const CALL: u8 = 0x85;
const MOVE: u8 = 0xbf;
const ADD_IMMEDIATE: u8 = 0x07;
/// Source registers of CALL and LOAD_64 that make a call of one function by another, and a pointer
/// to a function.
const PSEUDO_CALL: u8 = 1;
const PSEUDO_FUNC: u8 = 4;
const FRAME_POINTER: u8 = 10;
const R_BPF_64_64: u32 = 1;
const R_BPF_64_32: u32 = 10;

/// What a program takes with everything that it calls.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Usage {
    program: String,
    /// Of all functions that it reaches, each counted once.
    instructions: u64,
    /// The sum of the frames of the deepest chain of calls, in bytes.
    stack: u64,
    /// This chain: names and frames.
    chain: Vec<(String, u64)>,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { program, instructions, stack, .. } = self;
        write!(
            f,
            "{program}: {instructions} instructions, {stack} of {LIMIT} bytes of stack ({})",
            self.chain()
        )
    }
}

impl Usage {
    fn chain(&self) -> String {
        let frames: Vec<_> = self.chain.iter().map(|(name, frame)| format!("{name} {frame}")).collect();
        frames.join(" > ")
    }

    /// # Errors
    /// The verifier would refuse it.
    pub(super) fn check(&self) -> Result<()> {
        let Self { program, stack, .. } = self;
        ensure!(
            *stack <= LIMIT,
            "{program} needs {stack} bytes of stack, and the verifier allows {LIMIT}; make a frame of this chain smaller: {}",
            self.chain()
        );
        ensure!(
            self.chain.len() <= MAX_FRAMES,
            "{program} calls {} functions deep, and the verifier allows {MAX_FRAMES}: {}",
            self.chain.len(),
            self.chain()
        );
        Ok(())
    }
}

/// The section, and the place in it.
type Address = (usize, u64);

#[derive(Debug, Default)]
struct Function {
    name: String,
    instructions: u64,
    /// In bytes, rounded up as the verifier does.
    frame: u64,
    /// The functions that this one calls or passes as callbacks: both run on top of its frame.
    /// (Callbacks of timers do not, but are counted as if they did.)
    calls: Vec<Address>,
    is_program: bool,
}

/// What each program of `file` takes, in the order of their sections.
///
/// # Errors
/// The code cannot be understood.
pub(super) fn usages(file: &object::File<'_>) -> Result<Vec<Usage>> {
    let functions = functions(file)?;
    let programs = functions.iter().filter(|(_, function)| function.is_program);
    programs.map(|(address, function)| usage(&functions, *address, function)).collect()
}

fn usage(functions: &BTreeMap<Address, Function>, at: Address, program: &Function) -> Result<Usage> {
    let (mut reached, mut chain) = (BTreeMap::new(), Vec::new());
    let deepest = deepest(functions, at, &mut chain, &mut reached)
        .with_context(|| format!("cannot follow the calls of {}", program.name))?;
    let frames: Vec<_> = deepest.iter().map(|function| (function.name.clone(), function.frame)).collect();
    Ok(Usage {
        program: program.name.clone(),
        instructions: reached.values().sum(),
        stack: frames.iter().map(|(_, frame)| frame).sum(),
        chain: frames,
    })
}

/// The chain of calls from `at` that takes the most stack. `above` are the callers; what is reached
/// is noted.
fn deepest<'f>(
    functions: &'f BTreeMap<Address, Function>,
    at: Address,
    above: &mut Vec<Address>,
    reached: &mut BTreeMap<Address, u64>,
) -> Result<Vec<&'f Function>> {
    let function = functions.get(&at).with_context(|| format!("there is no function at {at:x?}"))?;
    ensure!(!above.contains(&at), "{} calls itself", function.name);
    reached.insert(at, function.instructions);
    above.push(at);
    let mut below = Vec::new();
    for call in &function.calls {
        let chain = deepest(functions, *call, above, reached)?;
        if depth(&chain) > depth(&below) {
            below = chain;
        }
    }
    above.pop();
    Ok([vec![function], below].concat())
}

fn depth(chain: &[&Function]) -> u64 {
    chain.iter().map(|function| function.frame).sum()
}

fn functions(file: &object::File<'_>) -> Result<BTreeMap<Address, Function>> {
    let mut functions = BTreeMap::new();
    for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text) {
        let name = readable(symbol.name().context("a function's name")?);
        let index = symbol.section_index().with_context(|| format!("{name} lies in no section"))?;
        let section = file.section_by_index(index).context("the section of a function")?;
        let code = section.data().context("the code of a section")?;
        let end = symbol.address().checked_add(symbol.size());
        let code = end.and_then(|end| code.get(to_usize(symbol.address())..to_usize(end)));
        let code = code.with_context(|| format!("{name} goes beyond its section"))?;
        let targets = targets(file, index)?;
        let mut function = read(code, index, symbol.address(), &targets)
            .with_context(|| format!("the code of {name} cannot be read"))?;
        // Functions that programs share are in the section that compilers use for all code.
        function.is_program = symbol.is_global() && section.name() != Ok(".text");
        functions.insert((index.0, symbol.address()), Function { name, ..function });
    }
    Ok(functions)
}

/// The symbols that instructions of a section refer to in code: by the instruction's place, the
/// relocation's type and what it is about.
fn targets(file: &object::File<'_>, index: SectionIndex) -> Result<BTreeMap<u64, (u32, Address)>> {
    let mut targets = BTreeMap::new();
    let section = file.section_by_index(index).context("a section of code")?;
    for (at, relocation) in section.relocations() {
        let (RelocationTarget::Symbol(symbol), RelocationFlags::Elf { r_type }) =
            (relocation.target(), relocation.flags())
        else {
            bail!("the relocation at {at:#x} is of an unknown kind");
        };
        let symbol = file.symbol_by_index(symbol).context("a relocation names no symbol")?;
        let Some(section) = symbol.section_index() else { continue };
        let kind = file.section_by_index(section).context("the section of a symbol")?.kind();
        if kind == SectionKind::Text {
            targets.insert(at, (r_type, (section.0, symbol.address())));
        }
    }
    Ok(targets)
}

/// Reads the code of a function that begins at `base` of the section `section`.
fn read(
    code: &[u8],
    section: SectionIndex,
    base: u64,
    targets: &BTreeMap<u64, (u32, Address)>,
) -> Result<Function> {
    let mut function = Function { instructions: code.len() as u64 / SLOT, ..Function::default() };
    let mut frame = Frame::default();
    let mut slots = (base..).step_by(8).zip(code.as_chunks::<8>().0);
    while let Some((at, slot)) = slots.next() {
        let [opcode, registers, o0, o1, i0, i1, i2, i3] = *slot;
        let (to, from) = (registers & 15, registers >> 4);
        let (offset, immediate) = (i16::from_le_bytes([o0, o1]), i32::from_le_bytes([i0, i1, i2, i3]));
        let target = targets.get(&at);
        frame.step(opcode, to, from, offset, immediate);
        match (opcode, from, target) {
            // Relative to the next instruction, in slots.
            (CALL, PSEUDO_CALL, Some((R_BPF_64_32, (section, symbol)))) => {
                function.calls.push((*section, place(*symbol, i64::from(immediate) + 1)?));
            }
            (CALL, PSEUDO_CALL, None) => {
                function.calls.push((section.0, place(at + SLOT, i64::from(immediate))?));
            }
            // The addend is in bytes.
            (LOAD_64, 0 | PSEUDO_FUNC, Some((R_BPF_64_64, (section, symbol)))) => {
                let address =
                    symbol.checked_add_signed(i64::from(immediate)).context("a pointer to nowhere")?;
                function.calls.push((*section, address));
            }
            (CALL, PSEUDO_CALL, Some((kind, _))) => {
                bail!("a call at {at:#x} with a relocation of type {kind}")
            }
            _ => {}
        }
        if opcode == LOAD_64 {
            // This instruction fills two slots.
            slots.next().context("it ends in the middle of an instruction")?;
        }
    }
    function.frame = frame.depth.max(1).next_multiple_of(ROUNDED_TO);
    Ok(function)
}

/// `slots` instructions after `from`.
fn place(from: u64, slots: i64) -> Result<u64> {
    from.checked_add_signed(slots * SLOT as i64).context("a call of nowhere")
}

/// What is known of a frame in the middle of a function: the registers that point into it, and how
/// deep it is.
#[derive(Debug)]
struct Frame {
    /// The distance from the frame pointer.
    pointers: [Option<i64>; 16],
    depth: u64,
}

impl Default for Frame {
    fn default() -> Self {
        let mut pointers = [None; 16];
        pointers[usize::from(FRAME_POINTER)] = Some(0);
        Self { pointers, depth: 0 }
    }
}

impl Frame {
    /// Code is followed from its beginning to its end, not along its jumps: LLVM computes the
    /// address of a variable where it first needs it, from the frame pointer, and what is added to
    /// it later leads to shallower places.
    fn step(&mut self, opcode: u8, to: u8, from: u8, offset: i16, immediate: i32) {
        const CLASS: u8 = 7;
        let pointer = |register: u8| self.pointers[usize::from(register)];
        let touched = match opcode & CLASS {
            // LDX reads by `from`; ST and STX write by `to`.
            1 => pointer(from).map(|base| base + i64::from(offset)),
            2 | 3 => pointer(to).map(|base| base + i64::from(offset)),
            _ => None,
        };
        let result = match (opcode, opcode & CLASS) {
            (MOVE, _) => pointer(from),
            (ADD_IMMEDIATE, _) => pointer(to).map(|base| base + i64::from(immediate)),
            // Stores and jumps change no register.
            (_, 2 | 3 | 5 | 6) => pointer(to),
            _ => None,
        };
        if to != FRAME_POINTER {
            self.pointers[usize::from(to)] = result;
        }
        if opcode == CALL {
            // The registers of arguments and result.
            self.pointers[..=5].fill(None);
        }
        for place in [touched, result].into_iter().flatten() {
            self.depth = self.depth.max(place.min(0).unsigned_abs());
        }
    }
}

/// `forward::known<Ipv6>` of the mangled name (v0) of this function.
fn readable(symbol: &str) -> String {
    let Some(mut rest) = symbol.strip_prefix("_R") else { return symbol.to_owned() };
    let mut words = Vec::new();
    while let Some(tag) = rest.chars().next() {
        rest = match tag {
            // A number that tells crates of one name apart, and one that refers to an earlier
            // place.
            's' | 'B' => rest.split_once('_').map_or("", |(_, rest)| rest),
            // A path's kind has a letter of its own.
            'N' => rest.get(2..).unwrap_or_default(),
            '1'..='9' => {
                let (word, rest) = word(rest);
                words.push(word);
                rest
            }
            _ => rest.get(tag.len_utf8()..).unwrap_or_default(),
        };
    }
    // The path of the function, and then that of the type it is for.
    let types = words.iter().position(|word| *word == "proxy_common").unwrap_or(words.len());
    let (path, types) = words.split_at(types);
    let of_type = types.last().map(|last| format!("<{last}>")).unwrap_or_default();
    let path: Vec<_> = path.iter().skip(path.len().saturating_sub(2)).copied().collect();
    path.join("::") + &of_type
}

/// The word at the beginning of `text`, which its length precedes, and what follows.
fn word(text: &str) -> (&str, &str) {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (length, after) = text.split_at(digits);
    length.parse().ok().and_then(|length| after.split_at_checked(length)).unwrap_or((after, ""))
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(opcode: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Vec<u8> {
        let [o0, o1] = offset.to_le_bytes();
        let [i0, i1, i2, i3] = immediate.to_le_bytes();
        vec![opcode, from << 4 | to, o0, o1, i0, i1, i2, i3]
    }

    fn function(name: &str, frame: u64, calls: &[u64]) -> Function {
        let calls = calls.iter().map(|call| (1, *call)).collect();
        Function { name: name.to_owned(), instructions: 10, frame, calls, is_program: false }
    }

    #[test]
    fn a_frame_is_as_deep_as_its_deepest_access() {
        const STORE: u8 = 0x7b;
        const EXIT: u8 = 0x95;
        let code = [
            slot(STORE, 10, 1, -8, 0),
            slot(MOVE, 2, 10, 0, 0),
            slot(STORE, 9, 1, -400, 0), // Another register: not this frame.
            slot(ADD_IMMEDIATE, 2, 0, 0, -40),
            slot(MOVE, 6, 2, 0, 0),
            slot(STORE, 6, 1, -24, 0), // 64 bytes from the frame pointer.
            slot(CALL, 0, 0, 0, 26),   // A helper, which takes the registers of arguments.
            slot(ADD_IMMEDIATE, 2, 0, 0, -400),
            slot(EXIT, 0, 0, 0, 0),
        ];
        let read = |code: &[Vec<u8>]| read(&code.concat(), SectionIndex(1), 0, &BTreeMap::new()).unwrap();
        assert_eq!((read(&code).frame, read(&code).instructions), (64, 9));
        assert_eq!(read(&code[..1]).frame, 32);
        assert_eq!(read(&code[8..]).frame, 32, "an empty frame counts, too");
    }

    #[test]
    fn calls_and_callbacks_are_found() {
        let code = [
            slot(CALL, 0, PSEUDO_CALL, 0, 3), // 4 slots from its own place.
            slot(CALL, 0, PSEUDO_CALL, 0, 4), // By a section's beginning: slot 5.
            slot(LOAD_64, 2, 0, 0, 48),
            slot(0, 0, 0, 0, 0),
            slot(CALL, 0, 0, 0, 181),
        ];
        let targets = BTreeMap::from([(108, (R_BPF_64_32, (7, 0))), (116, (R_BPF_64_64, (7, 0)))]);
        let function = read(&code.concat(), SectionIndex(1), 100, &targets).unwrap();
        assert_eq!(function.calls, [(1, 132), (7, 40), (7, 48)]);
    }

    #[test]
    fn the_deepest_chain_counts_and_what_is_too_deep_is_refused() {
        let functions = BTreeMap::from([
            ((1, 0), function("main", 64, &[8, 16])),
            ((1, 8), function("wide", 320, &[])),
            ((1, 16), function("narrow", 256, &[8, 24])),
            ((1, 24), function("leaf", 32, &[])),
            ((1, 32), function("endless", 32, &[32])),
        ]);
        let usage = |at: u64| usage(&functions, (1, at), &functions[&(1, at)]);
        let main = usage(0).unwrap();
        assert_eq!((main.stack, main.instructions), (640, 40));
        let refused = main.check().unwrap_err().to_string();
        assert!(refused.ends_with("main 64 > narrow 256 > wide 320"), "{refused}");
        usage(16).unwrap().check().unwrap_err();
        usage(8).unwrap().check().unwrap();
        assert!(format!("{:#}", usage(32).unwrap_err()).contains("endless calls itself"));
    }

    #[test]
    fn names_are_readable() {
        let known = "_RINvNtNtCsm0aMb6x4C7_10steer_ebpf6packet7forward5known\
                     NtNtNtCsedlkWNWugW7_12proxy_common6packet7headers4Ipv6EB6_";
        assert_eq!(readable(known), "forward::known<Ipv6>");
        assert_eq!(readable("_RNvNtNtCsm0aMb6x4C7_10steer_ebpf6packet6expiry4tick"), "expiry::tick");
        assert_eq!(readable("packet_ingress"), "packet_ingress");
        assert_eq!(readable("_R99x"), "x");
    }
}
