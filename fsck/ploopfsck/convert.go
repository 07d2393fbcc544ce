package ploopfsck

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/fsck"
)

// A conversion between the versions (OpenVZ lib/ploop.c) rewrites the entries
// of all images of a bundle in place. Before that it saves the header and BAT
// area of each as IMAGE.idx, byte for byte, and marks the images as in use and
// converting; afterwards it takes the marks off, image by image, and removes
// the copies. The guest cannot write in between, so each entry is the saved
// one, in either form, and both ways are open: back to what is saved, or on to
// the end. ploop's own tool goes back. That would leave a bundle of mixed
// versions when the crash came while the marks were being taken off; then the
// way is on.

// saved is the copy of an interrupted conversion.
type saved struct {
	f   backend.File
	h   header
	geo geometry
}

// conversion decides about an interrupted conversion. It reports whether
// nothing else is to be checked in this round.
func (c *check) conversion() (settled bool, err error) {
	if !c.convert {
		return false, nil
	}
	s, why, err := c.openSaved()
	if err != nil {
		return false, err
	}
	if s == nil {
		c.noSaved = why
		return false, nil
	}
	defer s.f.Close() // opened for reading
	forward := c.version != s.geo.version && c.othersDone(s.geo.version)
	differs, bad, err := c.compareSaved(s, forward)
	if err != nil {
		return false, err
	}
	if bad != "" {
		c.noSaved = bad
		return false, nil
	}
	f := fsck.Finding{Code: codeConverting, Place: fsck.Place{Offset: offFlags, Field: "m_Flags", Value: c.changed.u32(offFlags)},
		Text: fmt.Sprintf("from version %d, whose BAT is saved in %s; every entry is the saved one in one of the two forms", s.geo.version, c.savedName())}
	to := s.geo.version
	if forward {
		to = 3 - to
	}
	f.Fix = &fsck.Fix{Level: fsck.Preen, Text: fmt.Sprintf("go back to version %d with the saved BAT", to)}
	if forward {
		f.Fix.Text = fmt.Sprintf("finish it, as in the other images of the bundle: version %d", to)
	}
	if !c.report(f) {
		return true, nil
	}
	if err := c.writeSaved(s, differs, to); err != nil {
		return true, err
	}
	h := &c.changed
	copy(h[:], s.h[:])
	h.put32(offFlags, s.h.u32(offFlags)&^flagConverting)
	h.put32(offInUse, 0)
	if s.h.u32(offInUse) == inUseV21 {
		h.put32(offInUse, inUseV21) // it was closed, and nothing was written since
	}
	if to != s.geo.version {
		sig := sigV1
		if to == 2 {
			sig = sigV2
		}
		copy(h[:], sig)
	}
	return true, c.writeHeader()
}

func (c *check) savedName() string { return filepath.Base(c.f.Name()) + ".idx" }

// openSaved opens the copy and checks that it is of this image; nil with the
// reason when there is none that can be used.
func (c *check) openSaved() (*saved, string, error) {
	if c.o.OpenFile == nil {
		return nil, "", nil
	}
	f, err := c.o.OpenFile(c.savedName())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "there is no " + c.savedName(), nil
	}
	if err != nil {
		return nil, c.savedName() + ": " + err.Error(), nil
	}
	s := &saved{f: f}
	why := s.load(c)
	if why != "" {
		_ = f.Close() // opened for reading
		return nil, c.savedName() + " " + why, nil
	}
	return s, "", nil
}

// load reads the header of the copy, which has to be sound and of an image of
// the same shape. It returns why it is not.
func (s *saved) load(c *check) string {
	size, err := s.f.Size()
	if err != nil {
		return err.Error()
	}
	if n, err := s.f.ReadAt(s.h[:], 0); n < headerSize {
		return fmt.Sprintf("has no header: %v", err)
	}
	switch string(s.h[:16]) {
	case sigV1:
		s.geo.version = 1
	case sigV2:
		s.geo.version = 2
	default:
		return "is no copy of a BAT"
	}
	// With the version of the copy, and nothing else, changed.
	other := &check{geometry: geometry{version: s.geo.version}, eof: c.eof}
	fit := other.stated(&s.h)
	mine := fields{c.cluster / sectorSize, c.entries, c.size / sectorSize, c.firstData / sectorSize}
	switch {
	case !fit.whole() || s.h.u32(offType) != diskType:
		return "has a damaged header"
	case fit != mine:
		return "is of an image of another shape"
	case size != c.firstData:
		return fmt.Sprintf("has %d bytes, not %d", size, c.firstData)
	}
	s.geo.cluster, s.geo.entries, s.geo.size, s.geo.firstData = c.cluster, c.entries, c.size, c.firstData
	s.geo.step = 1
	if s.geo.version == 1 {
		s.geo.step = fit.spc
	}
	return ""
}

// othersDone reports whether another image of the bundle has left the
// conversion behind already, in the new version.
func (c *check) othersDone(old int) bool {
	if c.o.Siblings == nil || c.o.OpenFile == nil {
		return false
	}
	names, err := c.o.Siblings()
	if err != nil {
		return false
	}
	for _, name := range names {
		if name == filepath.Base(c.f.Name()) {
			continue
		}
		h, err := headerOf(c.o.OpenFile, name)
		if err != nil || h.u32(offSectors) != c.changed.u32(offSectors) || h.isSet(offFlags, flagConverting) {
			continue
		}
		if sig := string(h[:16]); sig == sigV1 && old == 2 || sig == sigV2 && old == 1 {
			return true
		}
	}
	return false
}

// headerOf reads the header of a file, whatever it is.
func headerOf(open func(string) (backend.File, error), name string) (h header, err error) {
	f, err := open(name)
	if err != nil {
		return h, err
	}
	defer f.Close() // opened for reading
	if n, err := f.ReadAt(h[:], 0); n < headerSize {
		return h, err
	}
	return h, nil
}

// target is the form that entry e, in the form of the copy, has in version.
func (s *saved) target(e uint32, version int) (uint32, bool) {
	if version == s.geo.version || e == 0 {
		return e, true
	}
	slot := int64(e) / s.geo.step
	if version == 2 {
		return uint32(slot), true
	}
	at := slot * (s.geo.cluster / sectorSize)
	return uint32(at), at < noEntry
}

// compareSaved compares the BAT with the copy. It returns whether entries have
// to be written, and what speaks against using the copy.
func (c *check) compareSaved(s *saved, forward bool) (differs bool, bad string, err error) {
	to := s.geo.version
	if forward {
		to = 3 - to
	}
	g := s.geo
	err = s.each(c, func(off int64, now, was []byte) error {
		for i := 0; i < len(was); i += 4 {
			idx := (off+int64(i))/4 - headerSize/4
			e, cur := le.Uint32(was[i:]), le.Uint32(now[i:])
			if e == 0 && cur == 0 {
				continue
			}
			new, ok := s.target(e, 3-s.geo.version)
			host := g.host(e)
			switch {
			case e == 0 || idx >= g.clusters() || int64(e)%g.step != 0 || host < g.firstData || host > c.eof-g.cluster:
				bad = fmt.Sprintf("%s does not fit the image: BAT[%d] is %#x there", c.savedName(), idx, e)
			case !ok && forward:
				bad = fmt.Sprintf("BAT[%d] = %#x has no form in version %d", idx, e, to)
			case cur != e && (!ok || cur != new):
				bad = fmt.Sprintf("BAT[%d] = %#x is not what %s has in any form (%#x)", idx, cur, c.savedName(), e)
			}
			if bad != "" {
				return errStop
			}
			want, _ := s.target(e, to)
			differs = differs || cur != want
		}
		return nil
	})
	if errors.Is(err, errStop) {
		err = nil
	}
	return differs, bad, err
}

var errStop = errors.New("stop")

// each calls do for the BAT in pieces: as it is, and as it is in the copy.
func (s *saved) each(c *check, do func(off int64, now, was []byte) error) error {
	now, was := make([]byte, partSize), make([]byte, partSize)
	for off := int64(headerSize); off < headerSize+4*c.entries; off += partSize {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		n := min(partSize, headerSize+4*c.entries-off)
		if err := c.read(now[:n], off); err != nil {
			return err
		}
		if k, err := s.f.ReadAt(was[:n], off); int64(k) < n {
			return fmt.Errorf("%s: %w", c.savedName(), err)
		}
		if err := do(off, now[:n], was[:n]); err != nil {
			return err
		}
	}
	return nil
}

// writeSaved enters the BAT in its form for a version in the plan.
func (c *check) writeSaved(s *saved, differs bool, version int) error {
	if !differs {
		return nil
	}
	return s.each(c, func(off int64, now, was []byte) error {
		for i := 0; i < len(was); i += 4 {
			e, _ := s.target(le.Uint32(was[i:]), version)
			le.PutUint32(was[i:], e)
		}
		for i := 0; i < len(was); i += 4096 {
			end := min(i+4096, len(was))
			if string(now[i:end]) == string(was[i:end]) {
				continue
			}
			if err := c.plan.Write(fsck.PhaseMap, off+int64(i), was[i:end]); err != nil {
				return err
			}
		}
		return nil
	})
}
