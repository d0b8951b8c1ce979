//! The kernel's BTF (`/sys/kernel/btf/vmlinux`): offsets of structure members,
//! and ids of the functions and tracepoints that programs attach to.
//!
//! Reads the format of `include/uapi/linux/btf.h` with bounds checks: a
//! malformed blob is an error, never a panic.

/// Where the kernel shows its BTF.
pub const SYS_PATH: &str = "/sys/kernel/btf/vmlinux";

/// `BTF_MAGIC`, the first two bytes.
pub const MAGIC: u16 = 0xeb9f;

/// `BTF_KIND_STRUCT`.
pub const KIND_STRUCT: u32 = 4;
/// `BTF_KIND_TYPEDEF`.
pub const KIND_TYPEDEF: u32 = 8;
/// `BTF_KIND_FUNC`.
pub const KIND_FUNC: u32 = 12;

const KIND_UNION: u32 = 5;

/// Deepest nesting of anonymous members and modifiers that is followed; the
/// kernel's own is below 10.
const MAX_DEPTH: u32 = 32;
/// Most members looked at for one path; the kernel's largest structures have
/// a few hundred.
const MAX_STEPS: u32 = 100_000;

const TYPE_CUT: &str = "malformed BTF: type cut short";

/// A parsed view of a blob.
#[derive(Debug)]
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where each type begins in `types`; index 0 is type 1.
    index: Vec<u32>,
    /// Ids of the wanted types.
    found: Vec<(Wanted, u32)>,
}

/// Kind and name of a type to look up.
pub type Wanted = (u32, &'static str);

/// `struct btf_type`, unpacked.
#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: u32,
    vlen: usize,
    kind_flag: bool,
    /// `size` or `type`.
    value: u32,
    /// Where its members or other data begin in `types`.
    rest: usize,
    /// Where it ends.
    end: usize,
}

impl<'a> Btf<'a> {
    /// Indexes a blob in the host's byte order. Only `wanted` types can be
    /// looked up by name afterwards.
    pub fn parse(blob: &'a [u8], wanted: &[Wanted]) -> Result<Self, String> {
        if blob.get(..2) != Some(&MAGIC.to_ne_bytes()) {
            return Err("malformed BTF: wrong magic".into());
        }
        let section = |at| {
            let start = (u32_at(blob, 4)? as usize).checked_add(u32_at(blob, at)? as usize)?;
            blob.get(start..start.checked_add(u32_at(blob, at + 4)? as usize)?)
        };
        let (Some(types), Some(strings)) = (section(8), section(16)) else {
            return Err("malformed BTF: cut short".into());
        };
        let mut btf = Self {
            types,
            strings,
            // A type takes about 25 bytes.
            index: Vec::with_capacity(types.len() / 20),
            found: Vec::new(),
        };
        let mut at = 0;
        while at < types.len() {
            let this = btf.read(at)?;
            btf.index.push(at as u32);
            let id = btf.index.len() as u32;
            for want in wanted.iter().filter(|want| want.0 == this.kind) {
                if btf.name(this.name) == want.1.as_bytes() {
                    btf.found.push((*want, id));
                }
            }
            at = this.end;
        }
        Ok(btf)
    }

    /// Id of the first wanted type of this kind and name.
    pub fn id(&self, wanted: Wanted) -> Option<u32> {
        self.ids(wanted).next()
    }

    /// Offset in bytes of a member of `struct container`, one of the wanted
    /// types. `path` has dots between nested structures; anonymous ones have no
    /// part in it.
    pub fn offset(&self, container: &'static str, path: &str) -> Result<u32, String> {
        match self.bit_offset(container, path)? {
            // A bit field has no address.
            bits if bits % 8 != 0 => Err(no_member(container, path)),
            bits => Ok(bits / 8),
        }
    }

    /// As [`Btf::offset`], in bits, for a member that may be a bit field. The
    /// lowest bit of a byte comes first, as on every little-endian machine.
    pub fn bit_offset(&self, container: &'static str, path: &str) -> Result<u32, String> {
        self.ids((KIND_STRUCT, container))
            .filter_map(|id| self.get(id))
            .find_map(|this| self.walk(this, path))
            .ok_or_else(|| no_member(container, path))
    }

    fn ids(&self, wanted: Wanted) -> impl Iterator<Item = u32> {
        let found = self.found.iter().filter(move |(want, _)| *want == wanted);
        found.map(|(_, id)| *id)
    }

    fn walk(&self, container: Type, path: &str) -> Option<u32> {
        let mut current = container;
        let mut offset = 0u32;
        let mut steps = MAX_STEPS;
        let mut names = path.split('.').peekable();
        while let Some(name) = names.next() {
            if name.is_empty() {
                return None;
            }
            let (bits, type_id) = self.member(current, name.as_bytes(), 0, &mut steps)?;
            offset = offset.checked_add(bits)?;
            if names.peek().is_some() {
                current = self.composite(type_id)?;
            }
        }
        Some(offset)
    }

    /// Bit offset and type of a member, through anonymous members.
    fn member(
        &self,
        container: Type,
        wanted: &[u8],
        depth: u32,
        steps: &mut u32,
    ) -> Option<(u32, u32)> {
        if depth > MAX_DEPTH {
            return None;
        }
        for number in 0..container.vlen {
            *steps = steps.checked_sub(1)?;
            let at = container.rest + number * 12;
            let name = u32_at(self.types, at)?;
            let type_id = u32_at(self.types, at + 4)?;
            let mut bits = u32_at(self.types, at + 8)?;
            if container.kind_flag {
                bits &= 0xff_ffff;
            }
            let name = self.name(name);
            if name == wanted {
                return Some((bits, type_id));
            }
            if name.is_empty()
                && let Some(inner) = self.composite(type_id)
                && let Some((inner_bits, type_id)) = self.member(inner, wanted, depth + 1, steps)
            {
                return Some((bits.checked_add(inner_bits)?, type_id));
            }
        }
        None
    }

    /// The structure or union behind typedefs and qualifiers.
    fn composite(&self, mut id: u32) -> Option<Type> {
        for _ in 0..MAX_DEPTH {
            let this = self.get(id)?;
            match this.kind {
                KIND_STRUCT | KIND_UNION => return Some(this),
                // TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG
                KIND_TYPEDEF | 9..=11 | 18 => id = this.value,
                _ => return None,
            }
        }
        None
    }

    fn get(&self, id: u32) -> Option<Type> {
        let at = *self.index.get((id as usize).checked_sub(1)?)?;
        self.read(at as usize).ok()
    }

    fn read(&self, at: usize) -> Result<Type, String> {
        let word = |nth: usize| u32_at(self.types, at + nth * 4).ok_or(TYPE_CUT);
        let info = word(1)?;
        let (kind, vlen) = ((info >> 24) & 0x1f, (info & 0xffff) as usize);
        let rest = at + 12;
        let this = Type {
            name: word(0)?,
            kind,
            vlen,
            kind_flag: info >> 31 == 1,
            value: word(2)?,
            rest,
            end: rest + rest_len(kind, vlen)?,
        };
        if this.end > self.types.len() {
            return Err(TYPE_CUT.into());
        }
        Ok(this)
    }

    fn name(&self, offset: u32) -> &'a [u8] {
        let tail = self.strings.get(offset as usize..).unwrap_or_default();
        let end = tail.iter().position(|byte| *byte == 0);
        &tail[..end.unwrap_or(tail.len())]
    }
}

/// The header of a blob whose strings follow its types.
pub fn header(type_bytes: u32, string_bytes: u32) -> Vec<u8> {
    let mut header = MAGIC.to_ne_bytes().to_vec();
    // Version 1, no flags.
    header.extend([1, 0]);
    for word in [24, 0, type_bytes, type_bytes, string_bytes] {
        header.extend(u32::to_ne_bytes(word));
    }
    header
}

fn no_member(container: &str, path: &str) -> String {
    format!("BTF has no member {path} of struct {container}")
}

/// Bytes after the common part of a type.
fn rest_len(kind: u32, vlen: usize) -> Result<usize, String> {
    Ok(match kind {
        // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG
        2 | 7..=12 | 16 | 18 => 0,
        // INT, VAR, DECL_TAG
        1 | 14 | 17 => 4,
        // ARRAY
        3 => 12,
        // STRUCT, UNION, DATASEC, ENUM64
        4 | 5 | 15 | 19 => vlen * 12,
        // ENUM, FUNC_PROTO
        6 | 13 => vlen * 8,
        _ => return Err(format!("BTF has a type of unknown kind {kind}")),
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(word.try_into().ok()?))
}

#[cfg(test)]
pub(super) mod tests;
