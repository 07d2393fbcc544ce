package hostile

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"
)

// bundle is what a DiskDescriptor.xml says.
type bundle struct {
	prolog, size, start, end, block string
	images                          []imageXML
	shots                           []shotXML
	top                             string
	extra                           string
}

type imageXML struct{ guid, kind, file string }
type shotXML struct{ guid, parent string }

const (
	xmlName = "DiskDescriptor.xml"
	topGUID = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
	zero    = "{00000000-0000-0000-0000-000000000000}"
)

func guid(i int) string { return fmt.Sprintf("{11111111-2222-3333-4444-%012x}", i) }

// newBundle is a sound one of a single image in pName.
func newBundle() bundle {
	return bundle{
		size: "2048", start: "0", end: "2048", block: "64",
		images: []imageXML{{topGUID, "Compressed", pName}},
		shots:  []shotXML{{topGUID, zero}},
		top:    topGUID,
	}
}

func (b bundle) String() string {
	var s strings.Builder
	s.WriteString(b.prolog)
	fmt.Fprintf(&s, "<Parallels_disk_image Version=\"1.0\">\n<Disk_Parameters><Disk_size>%s</Disk_size><Cylinders>4</Cylinders>"+
		"<Heads>16</Heads><Sectors>32</Sectors><Padding>0</Padding></Disk_Parameters>\n", b.size)
	fmt.Fprintf(&s, "<StorageData><Storage><Start>%s</Start><End>%s</End><Blocksize>%s</Blocksize>\n", b.start, b.end, b.block)
	for _, i := range b.images {
		fmt.Fprintf(&s, "<Image><GUID>%s</GUID><Type>%s</Type><File>%s</File></Image>\n", i.guid, i.kind, i.file)
	}
	fmt.Fprintf(&s, "</Storage>%s</StorageData>\n<Snapshots><TopGUID>%s</TopGUID>\n", b.extra, b.top)
	for _, shot := range b.shots {
		fmt.Fprintf(&s, "<Shot><GUID>%s</GUID><ParentGUID>%s</ParentGUID></Shot>\n", shot.guid, shot.parent)
	}
	s.WriteString("</Snapshots>\n</Parallels_disk_image>\n")
	return s.String()
}

func descriptor(title string, class Class, text string, exit int, words ...string) Case {
	return Case{
		Name: "descriptor " + title, Class: class, Image: ".", Exit: exit, Words: append(words, xmlName),
		Build: both(file(xmlName, []byte(text)), file(pName, newPloop())),
	}
}

func bundles() []Case {
	var all []Case
	with := func(title string, class Class, exit int, change func(b *bundle), words ...string) {
		b := newBundle()
		change(&b)
		all = append(all, descriptor(title, class, b.String(), exit, words...))
	}
	for title, text := range map[string]string{
		"empty":                 "",
		"of zeros":              strings.Repeat("\x00", 4096),
		"not XML":               "QFI\xfb",
		"cut off":               newBundle().String()[:300],
		"of another kind":       "<html/>",
		"in a strange encoding": `<?xml version="1.0" encoding="UTF-7"?>` + newBundle().String(),
	} {
		all = append(all, descriptor(title, Header, text, 1))
	}
	lol := `<!DOCTYPE lolz [<!ENTITY a "ha">`
	for c := 'b'; c <= 'k'; c++ {
		lol += fmt.Sprintf(`<!ENTITY %c "%s">`, c, strings.Repeat(fmt.Sprintf("&%c;", c-1), 10))
	}
	with("with an entity bomb", Bomb, 1, func(b *bundle) { b.prolog = lol + "]>"; b.size = "&k;" })
	with("with an external entity", Path, 1, func(b *bundle) {
		b.prolog = `<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/shadow">]>`
		b.images[0].file = "&e;"
	})
	all = append(all,
		descriptor("nested a million times", Bomb, strings.Repeat("<a>", 300_000), 1),
		descriptor("of a million nodes", Bomb, "<a>"+strings.Repeat("<b/>", 250_000)+"</a>", 1),
		Case{Name: "descriptor of 1 TiB", Class: Bomb, Image: ".", Exit: 1, Words: []string{xmlName}, Build: both(
			file(xmlName, []byte(newBundle().String())),
			func(d Dirs) error { return os.Truncate(filepath.Join(d.In, xmlName), 1<<40) })},
		descriptor("with a million attributes", Bomb, "<a"+strings.Repeat(` b=""`, 200_000)+"/>", 1),
		descriptor("with one name of 1 MB", Bomb, "<"+strings.Repeat("a", 1_000_000)+"/>", 1))
	for _, v := range []string{"-1", "9223372036854775808", "18446744073709551616", "1e9", "", "0x10", "9223372036854775807"} {
		with(fmt.Sprintf("Disk_size %q", v), Header, 1, func(b *bundle) { b.size = v }, "Disk_size")
		with(fmt.Sprintf("End %q", v), Header, 1, func(b *bundle) { b.end = v })
		with(fmt.Sprintf("Blocksize %q", v), Header, 1, func(b *bundle) { b.block = v }, "Blocksize")
	}
	with("Blocksize 0", Header, 1, func(b *bundle) { b.block = "0" }, "Blocksize")
	with("with two storages", Header, 1, func(b *bundle) { b.extra = "<Storage/>" }, "Storage")
	with("with a GUID that is none", Header, 1, func(b *bundle) { b.images[0].guid = "../../etc" }, "GUID")
	with("without images", Header, 4, func(b *bundle) { b.images = nil })
	with("with an image twice", Header, 4, func(b *bundle) { b.images = append(b.images, b.images[0]) })
	with("with a top that is not there", Chain, 4, func(b *bundle) { b.top = guid(7) }, "TopGUID")
	with("whose snapshot is its own parent", Chain, 4, func(b *bundle) { b.shots[0].parent = topGUID })
	with("whose snapshots form a ring", Chain, 4, func(b *bundle) {
		b.images = append(b.images, imageXML{guid(1), "Compressed", "b.hds"})
		b.shots = []shotXML{{topGUID, guid(1)}, {guid(1), topGUID}}
	}, "loop")
	with("whose images are one file", Chain, 4, func(b *bundle) {
		b.images = append(b.images, imageXML{guid(1), "Compressed", pName})
		b.shots = []shotXML{{topGUID, guid(1)}, {guid(1), zero}}
	})
	with("whose images are one file by two names", Chain, 4, func(b *bundle) {
		b.images = append(b.images, imageXML{guid(1), "Compressed", "./x/../" + pName})
		b.shots = []shotXML{{topGUID, guid(1)}, {guid(1), zero}}
	})
	with("of 3000 snapshots", Chain, 1, func(b *bundle) {
		b.images, b.shots = nil, nil
		for i := range 3000 {
			parent := guid(i + 1)
			if i == 2999 {
				parent = zero
			}
			b.images = append(b.images, imageXML{guid(i), "Compressed", fmt.Sprint(i, ".hds")})
			b.shots = append(b.shots, shotXML{guid(i), parent})
		}
		b.top = guid(0)
	}, "1000")
	with("whose image is itself", Chain, 1, func(b *bundle) { b.images[0].file = xmlName })
	for title, target := range badNames() {
		if strings.ContainsAny(target, "\x00\x1b") || !utf8.ValidString(target) {
			continue // not XML
		}
		if target == "" {
			continue
		}
		b := newBundle()
		b.images[0].file = strings.NewReplacer("&", "&amp;", "<", "&lt;", `"`, "&quot;").Replace(target)
		c := descriptor("image: "+title, Path, b.String(), 1)
		c.Build = both(c.Build, traps)
		all = append(all, c)
	}
	// A descriptor, or its lock, that is a link to somewhere else.
	all = append(all, Case{Name: "descriptor by a link out", Class: Path, Image: ".", Exit: 1, Build: func(d Dirs) error {
		return os.Symlink(filepath.Join(d.Outside, Secret), filepath.Join(d.In, xmlName))
	}})
	lock := descriptor("whose lock is a link out", Path, newBundle().String(), 0)
	lock.By = exits(0, 0, 0, 1) // readers need no lock that they would have to make
	lock.Build = both(lock.Build, func(d Dirs) error {
		return os.Symlink(filepath.Join(d.Outside, "made-by-a-link"), filepath.Join(d.In, xmlName+".lck"))
	})
	all = append(all, lock)
	return all
}
