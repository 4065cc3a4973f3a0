"""What the example's teacher knows, in four languages: our own sentences about ten things, and ways to ask for them."""

from __future__ import annotations

# A thing, and what is said of it; in one order in all languages.
FACTS = {
    "English": {
        "rain": "Rain falls from the clouds and makes the fields green.",
        "bread": "Bread is baked from flour, water and a little salt.",
        "the moon": "The moon shines at night and moves around the earth.",
        "a horse": "A horse runs fast and likes to eat grass.",
        "tea": "Tea is made with hot water and dried leaves.",
        "a forest": "A forest has many trees, and birds live in it.",
        "a clock": "A clock shows the hours and the minutes.",
        "snow": "Snow is white and cold and falls in winter.",
        "a bridge": "A bridge leads from one bank of the river to the other.",
        "a book": "A book has pages with words that people read.",
    },
    "German": {
        "Regen": "Regen fällt aus den Wolken und macht die Felder grün.",
        "Brot": "Brot backt man aus Mehl, Wasser und etwas Salz.",
        "den Mond": "Der Mond scheint in der Nacht und kreist um die Erde.",
        "ein Pferd": "Ein Pferd läuft schnell und frisst gern Gras.",
        "Tee": "Tee macht man mit heißem Wasser und trockenen Blättern.",
        "einen Wald": "Ein Wald hat viele Bäume, und Vögel leben darin.",
        "eine Uhr": "Eine Uhr zeigt die Stunden und die Minuten.",
        "Schnee": "Schnee ist weiß und kalt und fällt im Winter.",
        "eine Brücke": "Eine Brücke führt von einem Ufer des Flusses zum anderen.",
        "ein Buch": "Ein Buch hat Seiten mit Wörtern, die Menschen lesen.",
    },
    "Spanish": {
        "la lluvia": "La lluvia cae de las nubes y pone verdes los campos.",
        "el pan": "El pan se hace con harina, agua y un poco de sal.",
        "la luna": "La luna brilla de noche y gira alrededor de la tierra.",
        "un caballo": "Un caballo corre rápido y come hierba con gusto.",
        "el té": "El té se prepara con agua caliente y hojas secas.",
        "un bosque": "Un bosque tiene muchos árboles, y en él viven pájaros.",
        "un reloj": "Un reloj muestra las horas y los minutos.",
        "la nieve": "La nieve es blanca y fría y cae en invierno.",
        "un puente": "Un puente lleva de una orilla del río a la otra.",
        "un libro": "Un libro tiene páginas con palabras que la gente lee.",
    },
    "Japanese": {
        "雨": "雨は雲から降り、畑を緑にします。",
        "パン": "パンは小麦粉と水と少しの塩で焼きます。",
        "月": "月は夜に光り、地球のまわりを回ります。",
        "馬": "馬は速く走り、草を食べるのが好きです。",
        "お茶": "お茶はお湯と乾いた葉で作ります。",
        "森": "森には木がたくさんあり、鳥が住んでいます。",
        "時計": "時計は時間と分を示します。",
        "雪": "雪は白くて冷たく、冬に降ります。",
        "橋": "橋は川の岸から向こうの岸へ続きます。",
        "本": "本には人が読む言葉のページがあります。",
    },
}
# An instruction is a beginning, a thing and an end.
BEGINNINGS = {
    "English": ["Describe", "Tell us something true about", "Explain to the class", "Write one sentence about"],
    "German": [
        "Beschreibe", "Erkläre der Klasse", "Sag uns etwas Wahres über", "Schreibe einen Satz über",
        "Erzähle einem Kind etwas über", "Erzähle deinem Freund kurz von der Sache:", "Notiere das Wichtigste über",
        "Stelle jemandem vor:", "Gib eine Auskunft über", "Verfasse eine Zeile für das Heft über",
        "Denk an Folgendes und antworte:", "Ergänze den Eintrag im Wörterbuch:",
    ],
    "Spanish": [
        "Describe", "Explica a la clase", "Dinos algo cierto sobre", "Escribe una frase sobre",
        "Cuéntale a un niño qué es", "Di en pocas palabras a tu amigo algo de esto:", "Anota lo más importante sobre",
        "Preséntale a alguien", "Da información sobre", "Redacta una línea para el cuaderno sobre",
        "Piensa en lo siguiente y responde:", "Completa la entrada del diccionario:",
    ],
    "Japanese": [
        "説明してください：", "クラスのみんなに教えてください：",
        "本当のことを一つ述べなさい：", "次について一文を書いてください：",
        "子どもに話して聞かせなさい：", "友だちに短く話してください：",
        "大切な点をメモしなさい：", "だれかに紹介してください：",
        "情報をください：", "ノートに一行を書きなさい：",
        "次のものを思いうかべて答えなさい：", "辞書の項目を完成させてください：",
    ],
}  # fmt: skip
ENDS = {
    "English": ["in simple words.", "for a small child.", "as a teacher would."],
    "German": [
        ", in einfachen Worten.", ", so wie ein Lehrer spricht.", ". Höchstens ein Satz bitte.",
        ", ohne lange nachzudenken.", " – freundlich und klar.", ", damit es alle verstehen.",
        ", wie es im Lexikon steht.", ". Deine Antwort soll kurz sein.", ", für jemanden aus einem anderen Land.",
        ", bevor der Unterricht beginnt.",
    ],
    "Spanish": [
        ", con palabras sencillas.", ", como habla un maestro.", ". Una sola frase, por favor.",
        ", sin pensar mucho tiempo.", " – amable y claro.", ", para que todos lo entiendan.",
        ", como está en la enciclopedia.", ". Tu respuesta debe ser corta.", ", para alguien de otro país.",
        ", antes de que empiece la clase.",
    ],
    "Japanese": [
        "。やさしい言葉でお願いします。", "。先生が話すように。", "。長くても一文で。",
        "。あまり考えこまずに。", "。親切ではっきりと。",
        "。だれにでも分かるように。", "。百科事典に書いてあるように。",
        "。答えは短くしてください。", "。外国から来た人のために。",
        "。授業が始まる前に。",
    ],
}  # fmt: skip
