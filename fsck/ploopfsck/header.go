package ploopfsck

import (
	"cmp"
	"fmt"
	"math"
	"math/bits"

	"github.com/imagestack/imagestack/fsck"
)

// checkHeader finds the geometry, by evidence where a field is wrong. It
// returns false when nothing further can be checked.
func (c *check) checkHeader() (bool, error) {
	h := &c.changed
	if c.eof < headerSize {
		c.report(fsck.Finding{Code: codeShort, Place: fsck.Place{Offset: 0, Field: "file size", Value: c.eof}, Text: "no room for a header of 64 bytes"})
		return false, nil
	}
	if err := c.read(h[:], 0); err != nil {
		c.unreadable(0, "header", err)
		return false, nil
	}
	if !c.checkSignature(h) {
		return false, nil
	}
	fit, ok := c.fitGeometry(h)
	if !ok {
		c.report(fsck.Finding{Code: codeGeometry, Place: fsck.Place{Offset: offSectors, Field: "header"},
			Text: fmt.Sprintf("clusters of %d sectors, %d BAT entries, a disk of %d sectors, data from sector %d",
				h.u32(offSectors), h.u32(offBATEntries), c.sectorsOf(h), h.u32(offFirstBlock))})
		return false, nil
	}
	if t := h.u32(offType); t != diskType {
		if c.headerFix(codeType, offType, "m_Type", t, "must be 2", "set it to 2") {
			h.put32(offType, diskType)
		}
	}
	if c.version == 1 && h.u32(offSize+4) != 0 {
		if c.report(fsck.Finding{Code: codeHighWord, Place: fsck.Place{Offset: offSize + 4, Field: "m_SizeInSectors", Value: h.u64(offSize)},
			Text: "version 1 has 32 bits only", Fix: &fsck.Fix{Text: "zero the high half", Level: fsck.Preen}}) {
			h.put32(offSize+4, 0)
		}
	}
	c.applyGeometry(h, fit)
	return true, c.checkBATArea()
}

// headerFix reports a damaged field that a full repair sets right.
func (c *check) headerFix(code *fsck.Code, off int64, field string, value any, text, fix string) bool {
	// What else seems wrong may be so only because of this.
	c.doubtful()
	return c.report(fsck.Finding{Code: code, Place: fsck.Place{Offset: off, Field: field, Value: value}, Text: text,
		Fix: &fsck.Fix{Text: fix, Level: fsck.Full}})
}

// doubtful notes that the header may be wrong.
func (c *check) doubtful() {
	c.doubt = true
	c.suspect.Store(true)
}

// checkSignature finds the version.
func (c *check) checkSignature(h *header) bool {
	sig := string(h[offSig : offSig+16])
	same := func(want string) (n int) {
		for i := range 16 {
			if sig[i] == want[i] {
				n++
			}
		}
		return n
	}
	n1, n2 := same(sigV1), same(sigV2)
	c.version = 2
	want := sigV2
	if n1 > n2 {
		c.version, want = 1, sigV1
	}
	if max(n1, n2) == 16 {
		return true
	}
	f := fsck.Finding{Code: codeSignature, Place: fsck.Place{Offset: offSig, Field: "m_Sig", Value: sig}, Text: "not a ploop signature"}
	if max(n1, n2) < 12 || h.u32(offType) != diskType {
		c.report(f)
		return false
	}
	if fit, ok := c.fitGeometry(h); !ok || fit != c.stated(h) {
		c.report(f)
		return false
	}
	c.doubtful()
	f.Fix = &fsck.Fix{Text: "restore " + want, Level: fsck.Full}
	if c.report(f) {
		copy(h[offSig:], want)
	}
	return true
}

// fields are those that determine each other, in sectors and entries.
type fields struct{ spc, entries, sectors, first int64 }

func (c *check) sectorsOf(h *header) int64 {
	if c.version == 1 {
		return int64(h.u32(offSize))
	}
	return int64(min(h.u64(offSize), math.MaxInt64/sectorSize/2))
}

func (c *check) stated(h *header) fields {
	return fields{int64(h.u32(offSectors)), int64(h.u32(offBATEntries)), c.sectorsOf(h), int64(h.u32(offFirstBlock))}
}

// need is the number of entries for the disk.
func (f fields) need() int64 { return ceil(f.sectors, f.spc) }

// exact is the first sector behind the BAT at which a cluster may begin.
func (f fields) exact() int64 { return ceil(headerSize+4*f.entries, f.spc*sectorSize) * f.spc }

func (f fields) saneCluster() bool { return f.spc > 0 && f.spc <= maxClusterSectors }

// whole reports whether all fields agree.
func (f fields) whole() bool {
	return f.saneCluster() && f.entries == f.need() && f.first == f.exact()
}

// fitGeometry changes as few fields as possible so that they agree. Several
// fields say the same thing twice, so that one that is wrong stands out.
func (c *check) fitGeometry(h *header) (fields, bool) {
	f := c.stated(h)
	if f.whole() {
		return f, true
	}
	file := c.eof / sectorSize
	late := func(f fields) bool { return f.first%f.spc == 0 && f.first > f.exact() && f.first <= file }
	// Only QEMU makes clusters that are no power of two; where something is
	// wrong such a size is rather that.
	sane := f.saneCluster() && f.spc&(f.spc-1) == 0
	if f.saneCluster() && f.entries == f.need() && (sane || late(f)) {
		if !late(f) {
			f.first = f.exact()
		}
		return f, true
	}
	// The cylinders, which ploop and QEMU write and nobody reads, tell whose
	// word counts where the size of the disk and its entries disagree.
	cylinders := int64(h.u32(offCylinders))
	sizeProved := cylinders == min(f.sectors/geometryUnit, math.MaxUint32) && f.sectors >= geometryUnit
	var found []fields
	for s := range bits.Len(maxClusterSectors) {
		g := f
		if g.spc = 1 << s; g.whole() {
			found = append(found, g)
		}
	}
	if !sane {
		if len(found) == 1 {
			return found[0], true
		}
		return f, false
	}
	entries := f
	entries.entries = f.need()
	size := f
	size.sectors = f.entries * f.spc
	sizeOK := size.whole() && size.sectors <= math.MaxInt64/sectorSize/2 && (c.version == 2 || size.sectors <= math.MaxUint32)
	entriesOK := entries.entries <= math.MaxUint32 && entries.whole()
	switch {
	case len(found) == 1 && !entriesOK && (!sizeOK || sizeProved):
		return found[0], true
	case sizeOK && !sizeProved && (cylinders == min(size.sectors/geometryUnit, math.MaxUint32) || !entriesOK):
		return size, true
	case f.entries > f.need() && !sizeProved && (f.first == f.exact() || late(f)):
		return f, true // more entries than are needed do no harm
	case entriesOK:
		return entries, true
	case f.entries > f.need() && (f.first == f.exact() || late(f)):
		return f, true
	}
	return f, false
}

// applyGeometry reports in what fit differs from the header, and goes by it.
func (c *check) applyGeometry(h *header, fit fields) {
	old := c.stated(h)
	c.geometry.cluster = fit.spc * sectorSize
	c.size = fit.sectors * sectorSize
	c.entries = fit.entries
	c.firstData = fit.first * sectorSize
	c.step = 1
	if c.version == 1 {
		c.step = fit.spc
	}
	c.stats.VirtualSize, c.stats.ClusterSize = c.size, c.cluster
	c.stats.TotalClusters = c.clusters()
	if old.spc != fit.spc && c.headerFix(codeCluster, offSectors, "m_Sectors", h.u32(offSectors),
		"does not fit the other fields", fmt.Sprintf("set it to %d", fit.spc)) {
		h.put32(offSectors, uint32(fit.spc))
	}
	if old.entries != fit.entries && c.headerFix(codeBATSize, offBATEntries, "m_Size", h.u32(offBATEntries),
		fmt.Sprintf("a disk of %d clusters", c.clusters()), fmt.Sprintf("set it to %d", fit.entries)) {
		h.put32(offBATEntries, uint32(fit.entries))
	}
	if (c.version == 2 && h.u64(offSize) != uint64(fit.sectors) || c.version == 1 && h.u32(offSize) != uint32(fit.sectors)) &&
		c.headerFix(codeDiskSize, offSize, "m_SizeInSectors", uint64(old.sectors),
			fmt.Sprintf("%d BAT entries are for %d sectors", fit.entries, fit.sectors), fmt.Sprintf("set it to %d", fit.sectors)) {
		if c.version == 2 {
			h.put64(offSize, uint64(fit.sectors))
		} else {
			h.put32(offSize, uint32(fit.sectors))
		}
	}
	if old.first != fit.first && c.headerFix(codeFirstBlock, offFirstBlock, "m_FirstBlockOffset", h.u32(offFirstBlock),
		fmt.Sprintf("the BAT ends at byte %d, clusters have %d sectors, the file %d", headerSize+4*fit.entries, fit.spc, c.eof/sectorSize),
		fmt.Sprintf("set it to %d", fit.first)) {
		h.put32(offFirstBlock, uint32(fit.first))
	}
	note := func(code *fsck.Code, off int64, field string, value any, text string) {
		c.report(fsck.Finding{Code: code, Place: fsck.Place{Offset: off, Field: field, Value: value}, Text: text})
	}
	if fit.spc&(fit.spc-1) != 0 || fit.spc < 64 {
		note(codeClusterOdd, offSectors, "m_Sectors", uint32(fit.spc), "clusters that ploop does not accept")
	}
	if fit.entries > fit.need() {
		note(codeBATLonger, offBATEntries, "m_Size", uint32(fit.entries), fmt.Sprintf("the disk has %d clusters", fit.need()))
	}
	if fit.sectors%fit.spc != 0 {
		note(codePartial, offSize, "m_SizeInSectors", uint64(fit.sectors), "the last cluster is partial")
	}
	const known = flagEmpty | flagConverting
	if v := h.u32(offFlags); v&^known != 0 {
		note(codeFlags, offFlags, "m_Flags", v, "unknown bits")
	}
}

// maxFill is the largest BAT area that repair completes.
const maxFill = 256 << 20

// checkBATArea makes sure that the file is long enough for the BAT.
func (c *check) checkBATArea() error {
	c.convert = c.changed.isSet(offFlags, flagConverting)
	if c.eof >= c.firstData {
		return nil
	}
	f := fsck.Finding{Code: codeCutOff, Place: fsck.Place{Offset: c.eof, Field: "file size", Value: c.eof}, Guest: c.guest(0, c.clusters()),
		Text: fmt.Sprintf("data would begin at %#x", c.firstData)}
	if c.firstData-c.eof <= maxFill && c.canGrow(c.firstData) {
		f.Fix = &fsck.Fix{Text: "complete the BAT area with zeros", Level: fsck.Full, Loses: f.Guest}
	}
	if !c.report(f) {
		return nil
	}
	if err := c.plan.Zero(fsck.PhaseNew, c.eof, c.firstData-c.eof); err != nil {
		return err
	}
	c.eof = c.firstData
	return nil
}

// checkFlags comes last: it knows what else is wrong.
func (c *check) checkFlags() error {
	h := &c.changed
	clean := !c.blind.Load()
	if c.convert {
		f := fsck.Finding{Code: codeConverting, Place: fsck.Place{Offset: offFlags, Field: "m_Flags", Value: h.u32(offFlags)},
			Text: "entries are in either form; the BAT should be saved in the file of this name with .idx added"}
		if c.noSaved != "" {
			f.Text = "entries are in either form; " + c.noSaved
		}
		if clean && c.bad.Load() == 0 {
			f.Text = fmt.Sprintf("every entry is valid in the form of version %d; %s", c.version, cmp.Or(c.noSaved, "no saved BAT was looked for"))
			f.Fix = &fsck.Fix{Text: "clear the flag", Level: fsck.Full}
		}
		if c.report(f) {
			h.put32(offFlags, h.u32(offFlags)&^flagConverting)
		}
	}
	empty := h.isSet(offFlags, flagEmpty)
	if empty != (c.used == 0) && clean && !c.convert {
		code, text := codeEmptySet, "clear it"
		if !empty {
			code, text = codeEmptyMissing, "set it"
		}
		if c.report(fsck.Finding{Code: code, Place: fsck.Place{Offset: offFlags, Field: "m_Flags", Value: h.u32(offFlags)},
			Text: fmt.Sprintf("%d clusters are allocated", c.used), Fix: &fsck.Fix{Text: text, Level: fsck.Preen}}) {
			h.put32(offFlags, h.u32(offFlags)^flagEmpty)
		}
	}
	v := h.u32(offInUse)
	f := fsck.Finding{Code: codeInUse, Place: fsck.Place{Offset: offInUse, Field: "m_DiskInUse", Value: v}, Text: "not closed"}
	switch {
	case v == 0, v == inUseV21 && h.u64(offExtension) != 0:
		return nil
	case v == inUseV21:
		f.Code, f.Text = codeV21, "closed, but there is no extension"
	case v != inUseOpen:
		f.Code, f.Text = codeInUseValue, "unknown value"
	}
	if clean && c.damaged.Load() == 0 {
		f.Fix = &fsck.Fix{Text: "mark as closed", Level: fsck.Preen}
	}
	if c.report(f) {
		h.put32(offInUse, 0)
	}
	return nil
}

// writeHeader enters the changes of the header. The mark of being closed comes
// after everything else.
func (c *check) writeHeader() error {
	if c.plan == nil {
		return nil
	}
	var old header
	if err := c.read(old[:], 0); err != nil {
		return err
	}
	h := c.changed
	inUse := h.u32(offInUse)
	h.put32(offInUse, old.u32(offInUse))
	if h != old {
		if err := c.plan.Write(fsck.PhaseHeader, 0, h[:]); err != nil {
			return err
		}
	}
	if inUse != old.u32(offInUse) {
		var b [4]byte
		le.PutUint32(b[:], inUse)
		return c.plan.Write(fsck.PhaseFlags, offInUse, b[:])
	}
	return nil
}
