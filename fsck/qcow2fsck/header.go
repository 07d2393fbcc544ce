package qcow2fsck

import (
	"fmt"
	"math/bits"

	"github.com/imagestack/imagestack/fsck"
)

// Offsets of the header fields (section Header).
const (
	magic          = 0x514649fb
	offBackingOff  = 8
	offBackingSize = 16
	offClusterBits = 20
	offSize        = 24
	offCrypt       = 32
	offL1Size      = 36
	offL1Offset    = 40
	offRTOffset    = 48
	offRTClusters  = 56
	offNbSnap      = 60
	offSnapOffset  = 64
	offIncompat    = 72
	offCompat      = 80
	offAutoclear   = 88
	offOrder       = 96
	offLength      = 100
	offCType       = 104

	lengthV2 = 72
	lengthV3 = 104

	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtL2       = 1 << 4
	incompatKnown       = 1<<5 - 1

	autoclearBitmaps = 1 << 0
	autoclearRaw     = 1 << 1
	autoclearKnown   = 3

	maxL1Entries      = 32 << 20 / 8
	maxRefTableBytes  = 8 << 20
	maxBackingName    = 1023
	minClusterBits    = 9
	maxClusterBits    = 21
	minExtL2Bits      = 14
	maxSnapshots      = 65536
	maxSnapTableBytes = 64 << 20
)

// header is the header as found, or as the plan has it.
type header struct {
	version                     uint32
	backingOff                  uint64
	backingSize                 uint32
	clusterBits                 uint32
	size                        uint64
	crypt                       uint32
	l1Size                      uint32
	l1Off                       uint64
	rtOff                       uint64
	rtClusters                  uint32
	nbSnap                      uint32
	snapOff                     uint64
	incompat, compat, autoclear uint64
	order, length               uint32
	ctype                       uint8
	exts                        []extension
	extEnd                      int64 // first byte behind the end mark
}

// header reads the header and reports whether anything can be done with the
// image.
func (c *check) header() bool {
	b := make([]byte, 4096)
	n := c.read(b, 0)
	if n < lengthV2 {
		c.found(codeTruncated, int64(n), "header", n, "the file ends within the header", nil)
		return false
	}
	h := &c.h
	h.version = be32(b[4:])
	plausible := func() bool { // all but magic and version
		cb := be32(b[offClusterBits:])
		if cb < minClusterBits || cb > maxClusterBits {
			return false
		}
		mask := uint64(1)<<cb - 1
		return be64(b[offL1Offset:])&mask == 0 && be64(b[offRTOffset:])&mask == 0 && be64(b[offL1Offset:]) != 0 &&
			be64(b[offRTOffset:]) != 0 && be64(b[offRTOffset:]) < uint64(c.size)
	}
	v3 := func() bool {
		l := be32(b[offLength:])
		return n >= lengthV3 && l >= lengthV3 && l%8 == 0 && l <= 1024 && be32(b[offOrder:]) <= 6
	}
	if m := be32(b); m != magic {
		var fix *fsck.Fix
		if plausible() && (h.version == 2 || h.version == 3 && v3()) {
			fix = full("write the magic of qcow2, because all other fields fit")
		}
		if !c.found(codeMagic, 0, "magic", m, "the magic is wrong", fix) {
			return false
		}
		c.put32(fsck.PhaseHeader, 0, magic)
	}
	if h.version != 2 && h.version != 3 {
		var fix *fsck.Fix
		if plausible() && v3() {
			fix = full("set it to 3, whose fields fit")
		}
		if !c.found(codeVersion, 4, "version", h.version, "the version is neither 2 nor 3", fix) {
			return false
		}
		h.version = 3
		c.put32(fsck.PhaseHeader, 4, 3)
	}
	if h.version == 3 && n < lengthV3 {
		c.found(codeTruncated, int64(n), "header", n, "the file ends within the header", nil)
		return false
	}
	h.backingOff, h.backingSize = be64(b[offBackingOff:]), be32(b[offBackingSize:])
	h.clusterBits, h.size, h.crypt = be32(b[offClusterBits:]), be64(b[offSize:]), be32(b[offCrypt:])
	h.l1Size, h.l1Off = be32(b[offL1Size:]), be64(b[offL1Offset:])
	h.rtOff, h.rtClusters = be64(b[offRTOffset:]), be32(b[offRTClusters:])
	h.nbSnap, h.snapOff = be32(b[offNbSnap:]), be64(b[offSnapOffset:])
	h.order, h.length = 4, lengthV2
	if h.version == 3 {
		h.incompat, h.compat, h.autoclear = be64(b[offIncompat:]), be64(b[offCompat:]), be64(b[offAutoclear:])
		h.order, h.length = be32(b[offOrder:]), be32(b[offLength:])
	}
	if !c.clusterSize() {
		return false
	}
	if h.order > 6 {
		if !c.found(codeOrder, offOrder, "refcount_order", h.order, "counts cannot be wider than 64 bits",
			full("set it to 4 and count anew")) {
			h.order = 4 // to go on with; nothing can be said of counts
			c.blocks.unknown = true
		} else {
			h.order = 4
			c.blocks.rebuild = true
			c.put32(fsck.PhaseHeader, offOrder, 4)
		}
	}
	c.setGeometry()
	b = make([]byte, c.cs)
	b = b[:c.read(b, 0)]
	c.headerLength(b)
	if h.version == 3 && h.length > offCType && len(b) > offCType {
		h.ctype = b[offCType]
	}
	if !c.features(b) {
		return false
	}
	c.setGeometry()
	c.extensions(b)
	c.backingName(b)
	return c.incompatible() && c.extendedL2() && c.sizes()
}

// clusterSize judges cluster_bits.
func (c *check) clusterSize() bool {
	h := &c.h
	fits := func(bits uint32) bool { // everything in the header agrees with it
		mask := uint64(1)<<bits - 1
		if h.l1Off&mask != 0 || h.rtOff&mask != 0 || h.l1Off == 0 || h.rtOff == 0 || h.order > 6 {
			return false
		}
		span := bits + bits - 3
		if h.incompat&incompatExtL2 != 0 {
			span--
		}
		if h.size>>span > uint64(h.l1Size) || h.size>>span == uint64(h.l1Size) && h.size&(1<<span-1) != 0 {
			return false
		}
		var b [8]byte
		if c.read(b[:], int64(min(h.rtOff, 1<<62))) < 8 {
			return false
		}
		block := be64(b[:])
		if block == 0 || block&mask != 0 || block >= uint64(c.size) {
			return false
		}
		one := func(cluster int64) bool { // it is counted once in the first block
			perBlock := int64(1) << bits * 8 >> h.order
			if cluster >= perBlock {
				return true
			}
			v, ok := c.rawCount(int64(block), uint(h.order), cluster)
			return ok && v == 1
		}
		return one(0) && one(int64(h.rtOff>>bits)) && one(int64(h.l1Off>>bits)) && one(int64(block>>bits))
	}
	valid := h.clusterBits >= minClusterBits && h.clusterBits <= maxClusterBits
	if valid {
		// A valid size is doubted only when the tables contradict it in a way
		// that damage to one other field does not explain.
		mask := uint64(1)<<h.clusterBits - 1
		span := 2*h.clusterBits - 3
		unaligned := b2i(h.l1Off&mask != 0) + b2i(h.rtOff&mask != 0)
		if unaligned < 2 && h.size>>span <= uint64(h.l1Size) || fits(h.clusterBits) {
			return true
		}
	}
	var others []uint32
	for bits := uint32(minClusterBits); bits <= maxClusterBits; bits++ {
		if bits != h.clusterBits && fits(bits) {
			others = append(others, bits)
		}
	}
	// A smaller size agrees with the alignment of a larger one, and three
	// tables in a row are hardly all on boundaries of a size that is too large.
	if len(others) > 1 {
		others = others[len(others)-1:]
	}
	if valid && len(others) != 1 {
		return true // something else is wrong
	}
	var fix *fsck.Fix
	text := "the cluster size is impossible"
	if valid {
		text = "the tables contradict the cluster size"
	}
	if len(others) == 1 {
		fix = full(fmt.Sprintf("set it to %d, with which the tables agree", others[0]))
	}
	f := fsck.Finding{Code: codeClusterBits, Place: fsck.Place{Offset: offClusterBits, Field: "cluster_bits", Value: h.clusterBits}, Text: text, Fix: fix}
	if !c.report(f) {
		return false
	}
	h.clusterBits = others[0]
	return c.put32(fsck.PhaseHeader, offClusterBits, h.clusterBits)
}

// headerLength judges header_length.
func (c *check) headerLength(b []byte) {
	h := &c.h
	if h.version == 2 || h.length >= lengthV3 && h.length%8 == 0 && int64(h.length) <= c.cs && int(h.length) <= len(b) {
		return
	}
	want := uint32(lengthV3)
	if h.incompat&incompatCompression != 0 && !(len(b) >= lengthV3+4 && knownExtension(be32(b[lengthV3:]))) {
		want = lengthV3 + 8 // the compression type is behind the other fields
	}
	for _, l := range []uint32{lengthV3, lengthV3 + 8} {
		if int(l)+4 <= len(b) && knownExtension(be32(b[l:])) {
			want = l
		}
	}
	if c.found(codeLength, offLength, "header_length", h.length, "the length is impossible",
		full(fmt.Sprintf("set it to %d, where the extensions begin", want))) {
		c.put32(fsck.PhaseHeader, offLength, want)
	}
	h.length = want
}

// features judges what needs no other part of the file.
func (c *check) features(b []byte) bool {
	h := &c.h
	if h.crypt > 2 {
		c.found(codeCrypt, offCrypt, "crypt_method", h.crypt, "the encryption method is unknown", nil)
	}
	if unknown := h.compat &^ 1; unknown != 0 {
		c.found(codeFeatures, offCompat, "compatible_features", h.compat, "a compatible feature is not known", nil)
	}
	if unknown := h.autoclear &^ autoclearKnown; unknown != 0 {
		c.found(codeAutoclear, offAutoclear, "autoclear_features", h.autoclear, "an autoclear feature is not known", nil)
	}
	if h.autoclear&autoclearRaw != 0 && (h.incompat&incompatDataFile == 0 || h.backingOff != 0) {
		if c.found(codeRawBit, offAutoclear, "autoclear_features", h.autoclear, "the raw bit contradicts other fields", preen("clear the bit")) {
			h.autoclear &^= autoclearRaw
			c.put64(fsck.PhaseHeader, offAutoclear, h.autoclear)
		}
	}
	return true
}

// incompatible judges incompatible bits that are not known, by the table of
// names in the image.
func (c *check) incompatible() bool {
	h := &c.h
	for unknown := h.incompat &^ incompatKnown; unknown != 0; unknown &= unknown - 1 {
		bit := uint8(bits.TrailingZeros64(unknown))
		name, table := h.featureName(0, bit)
		text := fmt.Sprintf("incompatible feature bit %d is set", bit)
		var fix *fsck.Fix
		switch {
		case name != "":
			text = fmt.Sprintf("incompatible feature %q (bit %d) is set", name, bit)
		case table:
			fix = full("clear the bit, which the image's own table of features does not have")
		}
		if !c.found(codeIncompat, offIncompat, "incompatible_features", h.incompat, text, fix) {
			return false
		}
		h.incompat &^= 1 << bit
		c.put64(fsck.PhaseHeader, offIncompat, h.incompat)
	}
	return true
}

// l1Need is the number of L1 entries for a disk of size bytes.
func (c *check) l1Need(size uint64) uint64 {
	n := size / uint64(c.l2Span)
	if size%uint64(c.l2Span) != 0 {
		n++
	}
	return n
}

// sizes judges size, l1_size and l1_table_offset. It reports whether there is
// a table.
func (c *check) sizes() bool {
	h := &c.h
	sure := h.l1Size // entries that are certainly meant
	if n := c.l1Need(h.size); h.size < 1<<63 && n <= maxL1Entries {
		sure = min(sure, uint32(n))
	}
	if !c.aligned(h.l1Off, 8) || !c.looksLikeL1(h.l1Off, sure) {
		if h.l1Size == 0 && h.size == 0 {
			return true
		}
		var fix *fsck.Fix
		down := h.l1Off & 0x00fffffffffffe00 &^ uint64(c.cs-1)
		if down != h.l1Off && c.aligned(down, 8) && c.looksLikeL1(down, sure) {
			fix = full(fmt.Sprintf("take the table at %#x", down))
		}
		if !c.found(codeL1Offset, offL1Offset, "l1_table_offset", h.l1Off, "there is no L1 table", fix) {
			return false
		}
		h.l1Off = down
		c.put64(fsck.PhaseHeader, offL1Offset, down)
	}
	need := c.l1Need(h.size)
	room := (uint64(c.clusters)<<c.bits - h.l1Off) / 8 // entries that the file has
	if h.size >= 1<<63 || need > maxL1Entries {
		n := min(uint64(h.l1Size), maxL1Entries, room)
		to := n * uint64(c.l2Span)
		if !c.found(codeSize, offSize, "size", h.size, "the disk is larger than any L1 table can be",
			full(fmt.Sprintf("set it to %d, what the L1 table covers", to))) {
			h.size = to
		} else {
			h.size = to
			c.put64(fsck.PhaseHeader, offSize, to)
		}
		need = c.l1Need(to)
		c.setGeometry()
	}
	switch {
	case uint64(h.l1Size) > min(maxL1Entries, room):
		n := uint32(min(need, room))
		if c.found(codeL1Size, offL1Size, "l1_size", h.l1Size, "the table would reach behind the end of the file",
			full(fmt.Sprintf("set it to %d, what the disk needs", n))) {
			c.put32(fsck.PhaseHeader, offL1Size, n)
		}
		h.l1Size = n
		if uint64(n) < need {
			c.shrinkDisk()
		}
	case uint64(h.l1Size) < need:
		// The table goes on where the clusters behind are in use and hold
		// nothing that is no L1 entry.
		n := uint32(need)
		if c.aligned(h.l1Off, need*8) && c.looksLikeL1(h.l1Off, n) && c.counted(h.l1Off, need*8) {
			if c.found(codeL1Size, offL1Size, "l1_size", h.l1Size, fmt.Sprintf("the disk needs %d entries", need),
				full(fmt.Sprintf("set it to %d: the table goes on", n))) {
				c.put32(fsck.PhaseHeader, offL1Size, n)
				h.l1Size = n
			}
			return true
		}
		c.shrinkDisk()
	}
	return true
}

// shrinkDisk makes the disk as small as its L1 table.
func (c *check) shrinkDisk() {
	h := &c.h
	to := uint64(h.l1Size) * uint64(c.l2Span)
	if c.found(codeL1Size, offL1Size, "l1_size", h.l1Size, "the table covers less than the disk",
		full(fmt.Sprintf("make the disk %d bytes long, what the table covers", to), c.guest(int64(to), 1<<62)...)) {
		h.size = to
		c.put64(fsck.PhaseHeader, offSize, to)
		c.setGeometry()
	}
}
